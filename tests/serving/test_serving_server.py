"""A real server on 127.0.0.1, asked by OpenAI's own client and by bare sockets."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest

from serving_client import part, png
from siglip_hf.cli.main import main
from siglip_hf.serving.app import create_app
from siglip_hf.serving.server import Server, address_of, listen
from siglip_hf.serving.settings import Limits, Settings


@contextlib.contextmanager
def serving(door, seconds=10.0):
    """A server in a thread; its address."""
    ready = threading.Event()
    with listen("127.0.0.1", 0) as listening:
        server = Server(door, seconds, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(60)
        yield address_of(listening)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(embedder):
    limits = Limits(body_bytes=300_000, slow_seconds=1.0)
    with serving(
        create_app(
            Settings(api_keys=("a-secret-of-many-letters", "another-secret-of-mine"), limits=limits), embedder=embedder
        )
    ) as url:
        yield url


@pytest.fixture(scope="module")
def openai(address):
    client = pytest.importorskip("openai").OpenAI(
        base_url=f"{address}/v1", api_key="another-secret-of-mine", max_retries=0
    )
    with client:
        yield client


def test_the_openai_client(openai, embedder):
    """It asks for base64 by itself, and for floats when told so."""
    texts = ["a red car", "a cat"]
    expected = embedder.embed_texts(texts)
    reply = openai.embeddings.create(model="tiny-siglip", input=texts)
    np.testing.assert_allclose([row.embedding for row in reply.data], expected, atol=1e-5)
    assert (reply.model, reply.usage.prompt_tokens > 0) == ("tiny-siglip", True)
    reply = openai.embeddings.create(model="tiny-siglip", input=texts[0], encoding_format="float")
    np.testing.assert_allclose(reply.data[0].embedding, expected[0], atol=1e-5)
    picture = png(1)
    reply = openai.embeddings.create(model="tiny-siglip", input=[part(picture), "a cat"])
    np.testing.assert_allclose(reply.data[0].embedding, embedder.embed_images([picture])[0], atol=1e-5)
    assert [model.id for model in openai.models.list()] == ["tiny-siglip"]


def test_the_openai_client_understands_mistakes(openai, address):
    import openai as package

    with pytest.raises(package.BadRequestError, match="numbers of tokens"):
        openai.embeddings.create(model="tiny-siglip", input=[1, 2, 3])
    with pytest.raises(package.NotFoundError, match="is not served here"):
        openai.embeddings.create(model="other", input="a")
    stranger = package.OpenAI(base_url=f"{address}/v1", api_key="a-secret-of-many-lettersX", max_retries=0)
    with stranger, pytest.raises(package.AuthenticationError, match="wants a key"):
        stranger.embeddings.create(model="tiny-siglip", input="a")


def raw(address, text: bytes, wait: bool = True) -> bytes:
    """What a server answers to some bytes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(text)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def test_strangers_are_refused_before_their_body_is_read(address):
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 100\r\n\r\n"
    assert raw(address, head).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("length", [b"Content-Length: 300001", b"Transfer-Encoding: chunked"])
def test_bodies_are_taken_up_to_a_size(address, length):
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a-secret-of-many-letters\r\n" + length
    body = b"" if b"Length" in length else b"%x\r\n%s\r\n" % (300_001, b"x" * 300_001)
    answer = raw(address, head + b"\r\n\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"larger than 300,000 bytes" in answer


def test_a_slow_sender_is_not_waited_for(address):
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a-secret-of-many-letters\r\n"
    answer = raw(address, head + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_the_command_serves_logs_and_ends_well(checkpoint, tmp_path, monkeypatch):
    """From the command line to SIGTERM: what was taken is answered, and the end is a good one."""
    monkeypatch.setenv("SIGLIP_HF_API_KEYS", "a-secret-of-many-letters")
    arguments = ["serve", "--model", str(checkpoint), "--port", "0", "--dtype", "float32", "--wait", "1000"]
    program = "import sys, siglip_hf_command; sys.exit(siglip_hf_command.main())"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=log, text=True
        )
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), (tmp_path / "log").read_text()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer a-secret-of-many-letters"}

    def get(path, data=None):
        return urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=60)

    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(get("/v1/embeddings", b'{"input": "a secret text"}').status)
    )
    asking.start()
    # The text waits a second for company; the signal comes in that time.
    while not answers and b'siglip_pending{lane="texts"} 1.0' not in get("/metrics").read():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    asking.join(60)
    with process:
        assert (answers, process.wait(60)) == ([200], 0)
    said = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    (entry,) = [line for line in lines if line.get("path") == "/v1/embeddings"]
    assert (entry["status"], entry["method"], entry["bytes"]) == (200, "POST", 26)
    assert entry["client"].startswith("key ")
    assert "secret" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 would let everyone"),
        (["--index", "photos"], "--index photos: write NAME=FOLDER"),
        (["--index", "a=b", "--index", "a=c"], "the name 'a' is given twice"),
        (["--max-workers", "3"], "--max-workers is for --engine ray"),
        (["--model", "/nowhere/at/all"], "cannot load '/nowhere/at/all': no such folder"),
        (["--index", "a=/nowhere/a.idx"], "/nowhere/a.idx"),
    ],
)
def test_wrong_usage_is_told_in_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.delenv("SIGLIP_HF_API_KEYS", raising=False)
    assert main(["serve", "--port", "0", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1]
    assert said[-1].startswith("siglip-hf: ")


def test_a_port_that_is_taken_is_told(capsys):
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}: " in capsys.readouterr().err


def test_langchain_and_llama_index(address, embedder):
    """The call shapes of docs/serving.md."""
    langchain = pytest.importorskip("langchain_openai")
    options = {"api_key": "another-secret-of-mine", "model": "tiny-siglip", "check_embedding_ctx_length": False}
    client = langchain.OpenAIEmbeddings(base_url=f"{address}/v1", **options)
    np.testing.assert_allclose(client.embed_documents(["cat", "dog"]), embedder.embed_texts(["cat", "dog"]), atol=1e-5)
    llama_index = pytest.importorskip("llama_index.embeddings.openai_like")
    client = llama_index.OpenAILikeEmbedding(
        api_base=f"{address}/v1", api_key="another-secret-of-mine", model_name="tiny-siglip"
    )
    np.testing.assert_allclose(client.get_text_embedding("cat"), embedder.embed_texts("cat")[0], atol=1e-5)
