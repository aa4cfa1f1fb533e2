"""The page "multilingual": one picture, and labels for it in several languages, as a table language x label.

The languages of the default labels are those of the embedded checkpoint. NLLB-CLIP's tokenizer is told the language of
a row by its code of FLORES-200; other models read texts as they are.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from siglip_hf.apps import page
from siglip_hf.apps.scorers import Scorer
from siglip_hf.files import text_lines
from siglip_hf.inference.label_bank import parse_labels

if TYPE_CHECKING:
    import gradio

LABELS = """\
English: cat, dog, pizza, rocket, house
Deutsch: Katze, Hund, Pizza, Rakete, Haus
Français: chat, chien, pizza, fusée, maison
Español: gato, perro, pizza, cohete, casa
Italiano: gatto, cane, pizza, razzo, casa
Português: gato, cachorro, pizza, foguete, casa
Русский: кошка, собака, пицца, ракета, дом
한국어: 고양이, 개, 피자, 로켓, 집
日本語: 猫, 犬, ピザ, ロケット, 家
中文: 猫, 狗, 披萨, 火箭, 房子"""

#: Codes of FLORES-200, by what the language calls itself.
CODES = {
    "English": "eng_Latn",
    "Deutsch": "deu_Latn",
    "Français": "fra_Latn",
    "Español": "spa_Latn",
    "Italiano": "ita_Latn",
    "Português": "por_Latn",
    "Русский": "rus_Cyrl",
    "한국어": "kor_Hang",
    "日本語": "jpn_Jpan",
    "中文": "zho_Hans",
}

INTRODUCTION = """
# One picture, many languages
Choose a picture; the table shows how well each label fits it, in each language. A model that knows a language marks the
right label in it: the darker a field, the higher its score, and the best of a line has a frame.

To try your own labels, write a line for each language, with the same labels in the same order. A line may begin with
any name, or with a code such as `tha_Thai`, which NLLB-CLIP wants to know.
"""


def parse_lines(text: str) -> dict[str, tuple[str, ...]]:
    """Labels by language, from lines such as "English: cat, dog".

    Raises:
        ValueError: naming the line that has no language, no labels, a label twice, or not as many as the first line.
    """
    rows: dict[str, tuple[str, ...]] = {}
    text = page.limited(text, "the labels", page.MAX_LABELS_TEXT)
    for line in filter(None, map(str.strip, text_lines(text))):
        # Chinese and Japanese have a colon and commas of their own.
        language, *labels = (part.strip() for part in re.split("[:：]", line, maxsplit=1))
        names = [label.strip() for label in re.split("[,，、]", "".join(labels)) if label.strip()]
        if not language or not names:
            raise ValueError(f"the line {line!r} should be a language, a colon and labels, like 'English: cat, dog'.")
        if language in rows:
            raise ValueError(f"the language {language!r} has two lines; give each one.")
        if len(parse_labels(names)) != len(names):
            raise ValueError(f"the line {line!r} has a label twice; the labels of a language must differ.")
        rows[language] = tuple(names)
    if not rows:
        raise ValueError("there are no labels; write a line such as 'English: cat, dog'.")
    first = next(iter(rows))
    for language, names_of in rows.items():
        if len(names_of) != len(rows[first]):
            raise ValueError(
                f"{language!r} and {first!r} have {len(names_of)} and {len(rows[first])} labels; each language needs "
                "the same labels in the same order."
            )
    if sum(map(len, rows.values())) > page.MAX_LABELS:
        raise ValueError(f"{sum(map(len, rows.values()))} labels are too many; at most {page.MAX_LABELS} are taken.")
    return rows


def language_code(language: str) -> str | None:
    """The code of FLORES-200 for a language given by its own name or by that code; None if it is not known."""
    return language if re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", language) else CODES.get(language)


def score_languages(
    scorer: Scorer, picture: Image.Image, rows: dict[str, tuple[str, ...]]
) -> dict[str, tuple[torch.Tensor, int]]:
    """Scores of each language's labels, and which of them is the best.

    Args:
        scorer: the model.
        picture: an RGB picture.
        rows: C labels by language.

    Returns:
        By language: (C,) float32 in 0..1, for a softmax among that language's labels; and the place of the best one.
    """
    texts = [label for labels in rows.values() for label in labels]
    codes = [language_code(language) for language, labels in rows.items() for _ in labels]
    logits = scorer.logits(picture, texts, codes).unflatten(0, (len(rows), -1))  # (languages, C)
    # The best by logits: scores may saturate, and then the first would win.
    return {language: (scorer.scores(row), int(row.argmax())) for language, row in zip(rows, logits, strict=True)}


def as_table(scorer: Scorer, picture: Image.Image, rows: dict[str, tuple[str, ...]]) -> str:
    """What one model says, as HTML."""
    found = score_languages(scorer, picture, rows)
    head = next(iter(rows.values()))
    lines = [
        (language, [(label, float(scores[i]), i == best) for i, label in enumerate(rows[language])])
        for language, (scores, best) in found.items()
    ]
    bests = [best for _, best in found.values()]
    most = max(set(bests), key=bests.count)
    agreement = f"{bests.count(most)} of {len(bests)} languages say {head[most]!r}"
    facts = f"{scorer.reads_as}, {page.short_count(scorer.parameters)} parameters; {agreement}"
    return (
        f"<section><h3>{html.escape(scorer.name)}</h3>{page.note(facts)}"
        f'<div class="results">{page.score_table("language", head, lines)}</div></section>'
    )


def build(scorers: Sequence[Scorer]) -> gradio.Blocks:
    """The page.

    Args:
        scorers: the models, in the order they are shown.
    """
    gr = page.import_gradio()

    def answer(path: str | None, lines: str) -> str:
        if not path:
            return page.note("Upload or paste a picture, or take an example.")
        try:
            rows, picture = parse_lines(lines), page.read_upload(path)
            return "".join(as_table(scorer, picture, rows) for scorer in scorers)
        except (ValueError, OSError) as error:
            return page.problem(error)

    examples = page.demo_pictures()
    with gr.Blocks(title="siglip-hf: multilingual", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION)
        gr.HTML(page.model_line([scorer.source for scorer in scorers]))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = page.upload_box("Picture", value=examples[0], elem_id="picture", height=240)
                lines = gr.Textbox(
                    LABELS, label="Labels by language", lines=10, elem_id="labels", max_length=page.MAX_LABELS_TEXT
                )
                button = gr.Button("Compare", variant="primary", elem_id="compare")
                gr.Examples([[path] for path in examples], [picture], examples_per_page=24)
            with gr.Column(scale=2, min_width=280):
                results = gr.HTML(elem_id="results")
        gr.on(
            [picture.change, button.click, blocks.load], answer, [picture, lines], results, trigger_mode="always_last"
        )
    return blocks
