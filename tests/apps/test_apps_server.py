"""What the server of a page answers to a program."""

import http.client
import json
import urllib.error
import urllib.request

import pytest
import torch

import siglip_hf
from siglip_hf.apps import compare, page
from siglip_hf.apps.scorers import Scorer, load_scorer


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
def address(embedded):
    pytest.importorskip("gradio")
    blocks = compare.build([embedded])
    yield page.serve(blocks, wait=False).rstrip("/")
    blocks.close(verbose=False)


def ask(address, path, **options):
    request = urllib.request.Request(address + path, **options)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "path",
    [
        *("/monitoring", "/monitoring/summary", "/openapi.json", "/docs", "/gradio_api/openapi.json"),
        *("/gradio_api/info", "/gradio_api/info/", "/gradio_api/runs", "/gradio_api/vibe-code/", "/nothing"),
        *("/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/token", "/gradio_api/dev/reload", "/config/../info"),
    ],
)
def test_what_no_page_asks_for_is_not_there(address, path):
    assert ask(address, path) == (404, '{"detail": "There is nothing here."}')


def test_a_page_and_its_files_are_there(address):
    for path in ("/", "/config", "/theme.css", "/gradio_api/app_id"):
        assert ask(address, path)[0] == 200, path


def test_errors_are_in_our_words(address):
    """A file that was not uploaded, and a body that gradio's models refuse."""
    status, said = ask(address, "/gradio_api/file=/etc/passwd")
    assert (status, json.loads(said)["detail"]) in (
        (403, "This request cannot be answered."),
        (404, "There is nothing here."),
    )
    headers = {"Content-Type": "application/json"}
    status, said = ask(address, "/gradio_api/queue/join", data=b'{"data": 5}', headers=headers)
    assert (status, said) == (422, '{"detail": "This request cannot be answered."}')


def test_boards_are_taken_up_to_a_size(address):
    """What is too large is refused by its header, before anything of it is kept."""
    for length in ("8000001", "99999999999999999999"):
        host, port = address.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.putrequest("POST", "/gradio_api/component_server")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        # One of the parsers that uvicorn may use refuses a length beyond 64 bits by itself, as a bad request.
        assert connection.getresponse().status in ((413,) if int(length) < 2**63 else (400, 413))
        connection.close()
    headers = {"Content-Type": "application/json"}
    assert ask(address, "/gradio_api/component_server", data=b"{}", headers=headers)[0] in (400, 422, 500)
