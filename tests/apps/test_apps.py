"""The functions behind the pages; the pages themselves are tried in tests/browser."""

import dataclasses
import html
import io
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel

import siglip_hf
from siglip_hf.apps import compare, multilingual, page, search
from siglip_hf.apps.scorers import ClipScorer, Scorer, SiglipScorer, load_scorer
from siglip_hf.cli import main as cli
from siglip_hf.parallel import PIXELS
from siglip_hf.preprocessing.image_intake import PictureError
from tiny_clip import write_tiny_clip

PICTURES = {Path(path).stem: page.read_upload(path) for path in page.demo_pictures()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait when their work is shared out among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def embedded() -> Scorer:
    return load_scorer(siglip_hf.default_checkpoint())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    return str(write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip"))


@pytest.fixture(scope="module")
def clip(clip_folder) -> Scorer:
    return load_scorer(clip_folder)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


class TestUploads:
    def test_a_picture(self, tmp_path):
        Image.new("RGBA", (5, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
        picture = page.read_upload(str(tmp_path / "clear.png"))
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (5, 3), (255, 255, 255))

    def test_what_is_no_picture(self, tmp_path):
        path = tmp_path / "notes.png"
        path.write_text("no picture")
        with pytest.raises(PictureError, match=r"notes\.png.*no picture of a known format") as caught:
            page.read_upload(str(path))
        assert str(tmp_path) not in str(caught.value)

    def test_half_a_picture(self, tmp_path):
        path = tmp_path / "half.png"
        content = Path(page.demo_pictures()[0]).read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(PictureError, match=r"half\.png.*truncated"):
            page.read_upload(str(path))

    @pytest.mark.parametrize(("side", "words"), [(8_000, "8000 x 8000 pixels; at most 50"), (20_000, "bomb")])
    def test_too_many_pixels_are_refused_unread(self, tmp_path, monkeypatch, side, words):
        path = tmp_path / "large.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)))
        with path.open("ab") as file:
            file.write(chunk(b"IDAT", b""))
        monkeypatch.setattr(page, "load_picture", lambda path: pytest.fail("it was decoded"))
        with pytest.raises(PictureError, match=words):
            page.read_upload(str(path))

    def test_large_ones_share_the_budget_and_are_kept_small(self, tmp_path, monkeypatch):
        path = tmp_path / "wide.png"
        Image.new("RGB", (4000, 1000), "red").save(path)
        held = []
        load = page.load_picture
        monkeypatch.setattr(page, "load_picture", lambda path: (load(path), held.append(PIXELS._held))[0])
        picture = page.read_upload(str(path))
        assert (held, PIXELS._held) == ([4_000_000], 0)
        assert picture.size == (2048, 512)

    def test_the_box_hands_over_the_path_without_opening_the_file(self):
        gr = pytest.importorskip("gradio")
        box = page.upload_box("Picture")
        assert box.preprocess(None) is None
        assert box.preprocess(gr.data_classes.ImageData(path="/nowhere/a.png")) == "/nowhere/a.png"


def test_the_repository_has_no_symbolic_links():
    """Copies and checkouts on Windows break them; the demo's pictures once were one."""
    root = Path(__file__).parents[2]
    assert [
        path for room in ("src", "tests", "docs", "scripts") for path in (root / room).rglob("*") if path.is_symlink()
    ] == []
    assert len(page.demo_pictures()) == 24


class TestHtml:
    def test_names_and_labels_are_escaped(self):
        evil = "<script>alert(1)</script>"
        assert evil not in page.bar(evil, 0.5) + page.problem(evil) + page.note(evil)
        assert evil not in page.score_table(evil, [evil], [(evil, [(evil, 0.5, True)])])

    def test_a_bar(self):
        said = page.bar("cat", 0.125, pale=0.5)
        assert "width: 12.50%" in said
        assert "width: 50.00%" in said
        assert ">12.5%<" in said

    def test_counts(self):
        assert [page.short_count(n) for n in (7_004_930, 878_000_000, 1_136_000_000)] == ["7.0 M", "878.0 M", "1.1 B"]


class TestScorers:
    def test_siglip_is_the_sigmoid_of_its_logits(self, embedded):
        assert isinstance(embedded, SiglipScorer)
        assert (embedded.name, embedded.reads_as) == ("siglip-hf-pictures-64", "sigmoid")
        texts = ["dog", "cat", "pizza"]
        model = siglip_hf.SiglipModel.from_pretrained(siglip_hf.default_checkpoint(), dtype=torch.float32).eval()
        processor = siglip_hf.SiglipProcessor.from_pretrained(siglip_hf.default_checkpoint())
        with torch.no_grad():
            expected = model(**processor(text=texts, images=PICTURES["cat"], return_tensors="pt"))
        logits = embedded.logits(PICTURES["cat"], texts)
        torch.testing.assert_close(logits, expected.logits_per_image[0], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(embedded.scores(logits), logits.sigmoid())
        assert embedded.parameters == sum(p.numel() for p in model.parameters())
        assert embedded._pipeline.model.optimization.dtype == "float32"

    def test_clip_is_the_softmax_of_its_logits(self, clip, clip_folder):
        assert isinstance(clip, ClipScorer)
        assert clip.reads_as == "softmax"
        model, processor = AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
        texts = ["dog", "a cat, drawn", "x"]
        with torch.no_grad():
            inputs = processor(text=texts, images=PICTURES["cat"], return_tensors="pt", padding=True)
            expected = model(**inputs).logits_per_image[0]
        logits = clip.logits(PICTURES["cat"], texts)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(clip.scores(logits).sum(), torch.tensor(1.0))
        assert clip.attention(PICTURES["cat"]) is None

    def test_clip_cuts_long_texts(self, clip):
        assert clip.logits(PICTURES["cat"], ["word " * 200, "b"]).shape == (2,)

    def test_attention_of_the_embedded_checkpoint(self, embedded):
        attention = embedded.attention(PICTURES["cat"])
        assert attention.shape == (4, 4)
        torch.testing.assert_close(attention.sum(), torch.tensor(1.0))

    def test_what_cannot_be_loaded(self, tmp_path):
        with pytest.raises(ValueError, match="cannot load 'no/such-model'"):
            load_scorer("no/such-model")
        BertModel(
            BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        ).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="BertModel, which does not compare pictures with texts"):
            load_scorer(str(tmp_path))


class TestCompare:
    def test_two_families_answer_side_by_side(self, embedded, clip):
        first, second = compare.compare([embedded, clip], PICTURES["rocket"], "cat, rocket , dog", "{}")
        assert first.labels == second.labels == ("cat", "rocket", "dog")
        assert first.labels[int(first.logits.argmax())] == "rocket"
        torch.testing.assert_close(first.logits, embedded.logits(PICTURES["rocket"], ["cat", "rocket", "dog"]))
        assert first.heat_map.size == (256, 256)
        assert second.heat_map is None
        assert min(first.seconds, second.seconds) > 0

    def test_the_template_is_used(self, embedded):
        (plain,) = compare.compare([embedded], PICTURES["cat"], "cat", "{}")
        (drawn,) = compare.compare([embedded], PICTURES["cat"], "cat", "a drawing of {}")
        assert plain.logits != drawn.logits

    def test_cards(self, embedded, clip):
        first, second = map(compare.as_card, compare.compare([embedded, clip], PICTURES["cat"], "dog,cat,<b>"))
        assert first.index("cat<") < first.index("dog<")
        assert "sigmoid, 7.0 M parameters" in first
        assert first.count('class="pale"') == 3
        assert "&lt;b&gt;" in first
        assert "data:image/png;base64," in first
        assert "softmax, 0.0 M parameters" in second
        assert "pale" not in second

    @pytest.mark.parametrize(
        ("labels", "template", "message"),
        [
            (" , ", "{}", "no label"),
            ("cat", "a photo", "no single '{}'"),
            (",".join(map(str, range(201))), "{}", "201 labels are too many"),
            ("x" * 10_001, "{}", "the labels: 10,001 characters are too many"),
            ("cat", "{}" + "x" * 500, "the template: 502 characters are too many"),
            ("cat", "{:>50000000}", "no single '{}'"),
            ("cat", "{.__class__}", "no single '{}'"),
        ],
    )
    def test_mistakes(self, embedded, labels, template, message):
        with pytest.raises(ValueError, match=message):
            compare.compare([embedded], PICTURES["cat"], labels, template)


class TestMultilingual:
    def test_lines(self):
        rows = multilingual.parse_lines("English: cat , dog\n\n 日本語: 猫、犬 \n中文：猫，狗")
        assert rows == {"English": ("cat", "dog"), "日本語": ("猫", "犬"), "中文": ("猫", "狗")}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no labels"),
            ("cat, dog", "'cat, dog' should be a language"),
            ("English: , ", "should be a language"),
            ("English: cat, cat", "a label twice"),
            ("English: cat\nEnglish: dog", "'English' has two lines"),
            ("English: cat, dog\nDeutsch: Katze", "'Deutsch' and 'English' have 1 and 2 labels"),
            ("English: " + ",".join(map(str, range(201))), "201 labels are too many"),
            ("English: " + "x" * 10_000, "the labels: 10,009 characters are too many"),
        ],
    )
    def test_mistakes(self, text, message):
        with pytest.raises(ValueError, match=message):
            multilingual.parse_lines(text)

    def test_the_default_languages_are_those_of_the_card(self):
        card = Path(siglip_hf.default_checkpoint(), "README.md").read_text()
        languages = card.split("language: [")[1].split("]")[0].split(", ")
        assert len(multilingual.parse_lines(multilingual.LABELS)) == len(languages) == 10
        assert all(map(multilingual.language_code, multilingual.parse_lines(multilingual.LABELS)))

    def test_codes(self):
        assert multilingual.language_code("한국어") == "kor_Hang"
        assert multilingual.language_code("tha_Thai") == "tha_Thai"
        assert multilingual.language_code("Klingon") is None

    def test_a_rocket_in_all_languages(self, embedded):
        rows = multilingual.parse_lines(multilingual.LABELS)
        found = multilingual.score_languages(embedded, PICTURES["rocket"], rows)
        assert {rows[language][best] for language, (_, best) in found.items()} == {rows[name][3] for name in rows}
        expected = embedded.logits(PICTURES["rocket"], rows["Deutsch"]).sigmoid()
        torch.testing.assert_close(found["Deutsch"][0], expected)
        table = multilingual.as_table(embedded, PICTURES["rocket"], rows)
        assert "10 of 10 languages say &#x27;rocket&#x27;" in table
        assert table.count("class=best") == 10

    def test_clip_shares_out_within_a_language(self, clip):
        rows = {"English": ("cat", "dog"), "Deutsch": ("Katze", "Hund")}
        for scores, _ in multilingual.score_languages(clip, PICTURES["cat"], rows).values():
            torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """The demo's index, in a cache folder of its own."""
    for package in ("faiss", "pyarrow"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        stages: list[str] = []
        yield search.open_index(on_progress=stages.append)
        assert "building the demo's index: 24 of 24 pictures" in stages
        assert stages[-1] == "loading the model"


def names(found: search.Found) -> list[str]:
    return [hit.id for hit in found.hits]


class TestSearch:
    def test_words(self, index):
        found = search.find(index, text=" a pizza ", count=3)
        assert names(found)[0] == "pizza.png"
        assert "3 of 24 for &#x27;a pizza&#x27;" in found.status

    def test_a_picture(self, index):
        found = search.find(index, search.Picture(PICTURES["whale"], "whale.png"))
        assert names(found)[0] == "whale.png"
        assert found.hits[0].cosine == pytest.approx(1, abs=1e-2)
        assert len(found.hits) == 12

    def test_filters(self, index):
        assert names(search.find(index, text="an animal", pattern="*pictures/t*.png")) == sorted(
            ["tiger.png", "turtle.png"], key=names(search.find(index, text="an animal", count=24)).index
        )
        assert "tiger.png" in names(search.find(index, text="an animal", count=6))
        plain, without = (search.find(index, text="an animal", not_text=other, count=24) for other in ("", "tiger"))
        assert names(without).index("tiger.png") > names(plain).index("tiger.png")
        assert "&#x27;an animal&#x27;, not &#x27;tiger&#x27;" in without.status
        assert "Nothing found" in search.find(index, text="cat", pattern="*.jpg").status

    def test_nothing_asked(self, index):
        assert search.find(index, text=" ", not_text="cat", pattern=None) == search.find(index)
        assert search.find(index).hits == []
        assert "24 entries" in search.find(index).status

    def test_the_demo_index_is_built_once_and_again_if_damaged(self, index):
        stages: list[str] = []
        folder = search.demo_index(stages.append)
        assert stages == []
        next(Path(folder).glob("*.faiss")).write_bytes(b"broken")
        assert search.demo_index(stages.append) == folder
        assert stages

    def test_gallery(self, index, tmp_path):
        (hit,) = search.find(index, text="pizza", count=1).hits
        ((thumbnail, caption),) = search.gallery_items([hit])
        assert caption == f"{hit.cosine:.3f} ({hit.probability:.1%}) pizza.png"
        assert max(thumbnail.size) <= search.THUMBNAIL
        gone = dataclasses.replace(hit, path=str(tmp_path / "gone.png"), probability=None)
        ((thumbnail, caption),) = search.gallery_items([gone])
        assert caption == f"{hit.cosine:.3f} pizza.png"
        assert len(set(thumbnail.getdata())) == 1
        with pytest.raises(PictureError, match=r"gone\.png"):
            search.read_hit(str(tmp_path / "gone.png"))
        assert search.gallery_items([dataclasses.replace(hit, path=None)]) == []

    def test_drawings(self):
        board = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        assert search.read_drawing(None) is None
        assert search.read_drawing(png(board)) is None
        board.putpixel((1, 1), (255, 255, 0, 255))
        assert search.read_drawing(png(board)).name == "your drawing"

    def test_a_drawing_larger_than_a_board_is_refused_unread(self, monkeypatch):
        content = png(Image.new("1", (13_000, 13_000)))
        monkeypatch.setattr(page, "load_picture", lambda file: pytest.fail("it was decoded"))
        with pytest.raises(PictureError, match=r"the drawing.*13000 x 13000 pixels; at most 4 million"):
            search.read_drawing(content)

    def test_the_board_hands_over_the_file_as_it_came_and_keeps_few(self, index):
        pytest.importorskip("gradio")
        (board,) = [block for block in search.build(index).blocks.values() if block.elem_id == "draw"]
        for i in range(100):
            for part, at in (("composite", "null"), ("background", "null"), ("layer", "2")):
                data = {"id": f"id{i}", "type": part, "index": at}
                board.accept_blobs(SimpleNamespace(data=data, files=[("file", f"{part} {i}".encode())]))
        assert len(board.blob_storage) == 32
        assert all(kept.background is None and not kept.layers for kept in board.blob_storage.values())
        assert board.preprocess(board.data_model(id="id99")) == b"composite 99"
        assert board.preprocess(board.data_model(id="id99")) is None
        assert board.preprocess(board.data_model(id="id0")) is None
        assert board.preprocess(board.data_model(composite={"path": "/up/load.png"})) == "/up/load.png"
        assert board.preprocess(None) is board.preprocess(board.data_model()) is None

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ({"text": "x" * 2001}, "the words: 2,001 characters are too many; at most 2,000"),
            ({"text": "cat", "not_text": "x" * 2001}, "2,001 characters"),
            ({"text": "cat", "pattern": "x" * 501}, "the pattern of paths: 501 characters"),
            ({"text": ["cat"]}, "the words must be a text"),
            ({"text": "cat", "count": "many"}, "many"),
            ({"text": "a \udcff"}, "cannot be a text"),
        ],
    )
    def test_limits_are_kept_by_the_server(self, index, query, message):
        found = search.find(index, **query)
        assert found.hits == []
        assert message in html.unescape(found.status)

    def test_the_number_of_results_is_bounded(self, index, monkeypatch):
        asked = []
        monkeypatch.setattr(index, "search", lambda *arguments, k, path_filter: asked.append(k) or [])
        for count in (10**9, 60, 0, -5):
            search.find(index, text="cat", count=count)
        assert asked == [60, 60, 1, 1]

    def test_an_index_of_texts_is_shown_as_a_list(self, tmp_path):
        index_source = pytest.importorskip("siglip_hf.search.sources_to_index").index_source
        (tmp_path / "captions.txt").write_text("a cat\na rocket\na <b>pizza</b>\n")
        index_source([str(tmp_path / "captions.txt")], tmp_path / "texts.idx")
        index = search.open_index(tmp_path / "texts.idx")
        found = search.find(index, search.Picture(PICTURES["rocket"], "rocket.png"))
        assert found.hits[0].text == "a rocket"
        assert found.status.index("a rocket") < found.status.index("a cat")
        assert "&lt;b&gt;" in found.status
        assert search.gallery_items(found.hits) == []

    def test_what_is_no_index(self, tmp_path):
        with pytest.raises((OSError, ValueError), match="nothing"):
            search.open_index(tmp_path / "nothing")


class TestCommand:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch):
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the command sets it; it is put back after the test

    @pytest.fixture
    def served(self, monkeypatch):
        pytest.importorskip("gradio")
        calls = []
        monkeypatch.setattr(page, "serve", lambda *arguments: calls.append(arguments))
        return calls

    @pytest.mark.parametrize("name", ["search", "compare", "multilingual"])
    def test_starts_with_no_arguments(self, served, name, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cli.main(["app", name]) == 0
        ((blocks, host, port, share),) = served
        assert blocks.title == f"siglip-hf: {name}"
        assert (host, port, share) == ("127.0.0.1", None, False)

    def test_options(self, served, clip_folder):
        models = ["--model", siglip_hf.default_checkpoint(), "--model", clip_folder]
        assert cli.main(["app", "compare", *models, "--host", "0.0.0.0", "--port", "8000", "--share"]) == 0
        assert served[0][1:] == ("0.0.0.0", 8000, True)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nothing"], "nothing"),
            (["compare", "--index", "x"], "--index is for the page search"),
            (["search", "--model", "x"], "--model is for the others"),
            (["compare", "--model", "no/such-model"], "cannot load 'no/such-model'"),
        ],
    )
    def test_mistakes(self, served, capsys, arguments, message):
        assert cli.main(["app", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_a_port_that_is_taken(self, capsys):
        pytest.importorskip("gradio")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert cli.main(["app", "compare", "--port", str(port)]) == 2
        assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err

    def test_an_address_of_another_machine(self):
        gr = pytest.importorskip("gradio")
        with gr.Blocks(analytics_enabled=False) as blocks:
            gr.Markdown("a page")
        with pytest.raises(OSError, match="cannot listen on no such host, port 7999"):
            page.serve(blocks, "no such host", 7999, wait=False)

    def test_uploads_go_with_a_page_that_is_terminated(self, tmp_path):
        """In a process of its own, as a service manager starts and ends it."""
        pytest.importorskip("gradio")
        script = "import sys; from siglip_hf.cli.main import main; sys.exit(main(['app', 'compare']))"
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout.readline().startswith(b"http://127.0.0.1:")
                (uploads,) = tmp_path.glob("siglip-hf-*")
                (uploads / "upload.png").write_bytes(b"private")
                process.terminate()
                process.wait(300)
            finally:
                process.kill()
        assert not uploads.exists()

    def test_uploads_go_when_the_page_does(self, monkeypatch):
        pytest.importorskip("gradio")
        folders = []
        monkeypatch.setattr(page, "serve", lambda blocks, *options: folders.append(os.environ["GRADIO_TEMP_DIR"]))
        assert cli.main(["app", "compare"]) == 0
        assert not os.path.exists(folders[0])

    def test_without_gradio(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert cli.main(["app", "compare"]) == 2
        assert "the pages need gradio: pip install gradio" in capsys.readouterr().err

    def test_gradio_is_told_not_to_report(self, monkeypatch):
        pytest.importorskip("gradio")
        monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
        page.import_gradio()
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
