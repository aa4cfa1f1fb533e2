"""The lock, the writers, the checksum and the JSON reader that the whole package uses."""

import errno
import hashlib
import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest

from siglip_hf import files

SOURCES = Path(files.__file__).parent


def test_checksums_are_those_of_hashlib(tmp_path):
    assert files.sha256([b"ab", bytearray(b"c")]) == hashlib.sha256(b"abc").hexdigest()
    (tmp_path / "a").write_bytes(b"x" * (files._BLOCK + 1))
    (tmp_path / "b").write_bytes(b"y")
    expected = hashlib.sha256(b"x" * (files._BLOCK + 1) + b"y").hexdigest()
    assert files.sha256_of_files([tmp_path / "a", tmp_path / "b"]) == expected


def _report_whether_locked(folder, queue):
    try:
        with files.only_run(folder):
            queue.put("held")
    except OSError as error:
        queue.put(str(error))


def test_one_run_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with files.only_run(tmp_path / "out"):
        with pytest.raises(OSError, match=r"another run is writing to .*out; wait"), files.only_run(tmp_path / "out"):
            pass
        process = context.Process(target=_report_whether_locked, args=(tmp_path / "out", queue))
        process.start()
        assert queue.get(timeout=60).startswith("another run is writing to ")
        process.join()
    with files.only_run(tmp_path / "out"):
        pass


def write_and_fail(path, error):
    """Begins a file and is stopped."""
    with files.new_file(path) as partial:
        partial.write_text("half")
        raise error


def write_folder_and_fail(path, error):
    """Begins a folder and is stopped."""
    with files.new_folder(path, overwrite=False, marker="m") as folder:
        (folder / "m").write_text("half")
        raise error


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(path, KeyboardInterrupt())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    with files.new_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path, number):
    message = rf"cannot write to {re.escape(str(tmp_path))} \({os.strerror(number)}\); what was done before is safe"
    for begin in (write_and_fail, write_folder_and_fail):
        with pytest.raises(OSError, match=message) as caught:
            begin(tmp_path / "a", OSError(number, os.strerror(number)))
        assert caught.value.errno == number
        assert set(os.listdir(tmp_path)) <= {".a.lock"}
        with pytest.raises(FileNotFoundError, match="elsewhere"):  # it has nothing to do with the disk: as it is
            begin(tmp_path / "a", FileNotFoundError(errno.ENOENT, "No such file", "elsewhere"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/1"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 350592 vs 350484"),
    ],
)
def test_a_full_disk_in_the_words_of_other_libraries(tmp_path, error):
    said = f"cannot write to {re.escape(str(tmp_path))} .No space left"
    with pytest.raises(OSError, match=said) as raised, files.name_full_disk(tmp_path):
        raise error
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="os error 13"), files.name_full_disk(tmp_path):
        raise RuntimeError("I/O error: Permission denied (os error 13)")


def test_a_manifest_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(OSError, match="a FIFO, socket or device, not a file"):
        files.read_sealed_json(tmp_path / "manifest.json")


def test_two_that_write_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with files.new_file(path) as one:
        with files.new_file(path) as other:
            one.write_text("one, half")
            other.write_text("other")
        assert path.read_text() == "other"
        one.write_text("one")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_writer_of_a_file_left_is_removed_when_it_is_old(tmp_path):
    for name in (".a.txt.7-0.partial", ".a.txt.8-0.partial", ".b.txt.7-0.partial"):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / ".a.txt.8-0.partial")  # someone may be writing
    with files.new_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert sorted(os.listdir(tmp_path)) == [".a.txt.8-0.partial", ".b.txt.7-0.partial", "a.txt"]


def write_folder(path, text="new", overwrite=False):
    with files.new_folder(path, overwrite=overwrite, marker="m") as folder:
        (folder / "m").write_text(text)


def test_a_folder_that_a_killed_run_left_is_finished_or_removed(tmp_path):
    for name in (".out.replaced-7", f".out.partial-{os.getpid()}", ".other.partial-7"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.replaced-7" / "m").write_text("old")
    with pytest.raises(ValueError, match="is not empty"):  # it is there again
        write_folder(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".other.partial-7", ".out.lock", "out"]
    assert (tmp_path / "out" / "m").read_text() == "old"
    write_folder(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "m").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [".other.partial-7", ".out.lock", "out"]


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    with files.new_folder(tmp_path / "out", overwrite=False, marker="m") as folder:
        (folder / "m").write_text("first")
        with pytest.raises(OSError, match=r"another run is writing to .*out; wait"):
            write_folder(tmp_path / "out")
    assert (tmp_path / "out" / "m").read_text() == "first"


def test_any_flipped_bit_of_a_sealed_file_is_found(tmp_path):
    path = tmp_path / "manifest.json"
    content = {"model": 'größer "x" \\', "parts": {"a": 1}, "empty": "", "none": None}
    files.write_sealed_json(path, content)
    whole = path.read_bytes()
    found = files.read_sealed_json(path)
    assert {name: found[name] for name in content} == content
    assert len(found["checksum"]) == 64
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            read = files.read_sealed_json(path)
        except ValueError:
            continue
        # Only the name of the field itself can be hit unseen; its readers refuse a field that they do not know.
        assert "checksum" not in read, whole[: place // 8 + 1]
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"checksum|Expecting|Unterminated|delimiter|decode|Invalid"):
            files.read_sealed_json(path)


def test_any_flipped_bit_of_a_sealed_folder_is_found(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"some")
    (tmp_path / "deep" / "b").write_bytes(b"bytes")
    files.check_folder(tmp_path)  # not sealed yet
    files.seal_folder(tmp_path)
    files.check_folder(tmp_path)
    for name in ("a", "deep/b", "checksums.json"):
        whole = (tmp_path / name).read_bytes()
        for place in range(0, 8 * len(whole), 7 if name == "checksums.json" else 1):
            content = bytearray(whole)
            content[place // 8] ^= 1 << place % 8
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/(a|deep/b|checksums.json) is damaged: "):
                files.check_folder(tmp_path)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "deep" / "b").unlink()
    with pytest.raises(ValueError, match=r"deep/b is damaged: No such file"):
        files.check_folder(tmp_path)


def test_json_that_is_not_sealed_is_read(tmp_path):
    (tmp_path / "a").write_text(json.dumps({"a": 1}))
    assert files.read_sealed_json(tmp_path / "a") == {"a": 1}
    for text, message in (("[]", "an object"), ('"a"', "an object"), ("{", "Expecting"), ("", "Expecting")):
        (tmp_path / "a").write_text(text)
        with pytest.raises(ValueError, match=message):
            files.read_sealed_json(tmp_path / "a")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_json_nested_too_deeply_is_a_value_error(text):
    with pytest.raises(ValueError, match="nested too deeply"):
        files.parse_json(text)


def test_no_other_module_locks_or_hashes_or_replaces_files():
    words = re.compile(r"\bfcntl\b|\bhashlib\.sha256\b|\bNamedTemporaryFile\b|\bmsvcrt\b|\bfilelock\b|\bos\.fsync\b")
    found = {
        f"{path.relative_to(SOURCES).as_posix()}: {line.strip()}"
        for path in SOURCES.rglob("*.py")
        for line in path.read_text(encoding="utf-8").split("\n")
        if path.name != "files.py" and words.search(line)
    }
    assert found == set()
