"""Keys, where a server listens, and which addresses it fetches from."""

from __future__ import annotations

import http.server
import socket
import threading

import pytest

from siglip_hf.serving import security
from siglip_hf.serving.security import check_exposure, client_of, fetch, key_file_warning, read_keys


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# mine\nfirst-key-of-sixteen\n\n second-key-of-sixteen \n")
    environment = {"SIGLIP_HF_API_KEYS": "third-key-of-sixteen, first-key-of-sixteen"}
    assert read_keys(file, environment) == ("first-key-of-sixteen", "second-key-of-sixteen", "third-key-of-sixteen")
    assert read_keys(None, {}) == ()
    file.chmod(0o644)
    assert "chmod 600" in key_file_warning(file)
    file.chmod(0o600)
    assert key_file_warning(file) is None


def test_keys_that_can_be_guessed_are_refused_without_being_shown(tmp_path):
    with pytest.raises(ValueError, match="API key number 1 must have 16 or more") as error:
        read_keys(None, {"SIGLIP_HF_API_KEYS": "short"})
    assert "short" not in str(error.value)
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(tmp_path / "empty", {})


def test_all_keys_are_compared_whichever_fits(monkeypatch):
    compared = []
    compare = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    assert client_of(b"Bearer one", ("one", "two", "three")) is not None
    assert client_of(b"Bearer four", ("one", "two", "three")) is None
    assert compared == [b"one", b"two", b"three"] * 2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_this_machine_needs_no_key(host):
    check_exposure(host, (), False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_beyond_this_machine_a_key_or_a_word_is_needed(host):
    with pytest.raises(ValueError, match="--api-key FILE or SIGLIP_HF_API_KEYS"):
        check_exposure(host, (), False)
    check_exposure(host, ("a key",), False)
    check_exposure(host, (), True)


PRIVATE = [
    *("127.0.0.1", "10.0.0.1", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"),
    *("::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "fe80::1", "fd00::1", "2002:7f00:1::", "64:ff9b::7f00:1", "::"),
]


def resolving(monkeypatch, *addresses):
    """Every name has these addresses."""
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(security.socket, "getaddrinfo", lambda host, port, **options: entries)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_after_resolution(monkeypatch, address):
    """Also where only one of several is private."""
    resolving(monkeypatch, "93.184.216.34", address)
    with pytest.raises(ValueError, match="not a public one"):
        fetch("http://pictures.example/a.png", 100, 1)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a/b", "http://", "http://a b/", "http://[", "gopher://a", "http://a\r\nX: y/"]
)
def test_other_addresses_are_refused(url):
    with pytest.raises(ValueError, match="address"):
        fetch(url, 100, 1)


@pytest.fixture
def web(monkeypatch):
    """A web server on this machine, for once taken for a public one; the hosts that were asked for."""
    hosts = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hosts.append(self.headers["Host"])
            if self.path.startswith("/to"):
                self.send_response(302)
                self.send_header("Location", self.path.partition("=")[2] or "/to")
                self.end_headers()
            else:
                self.send_response(200 if self.path == "/a.png?x=1" else 404)
                self.end_headers()
                self.wfile.write(b"x" * 1000)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    resolve = socket.getaddrinfo
    is_public = security._is_public
    names = {"public.example": "127.0.0.1", "private.example": "10.0.0.1"}
    monkeypatch.setattr(
        security.socket,
        "getaddrinfo",
        lambda host, port, *rest, **options: resolve(names.get(host, host), port, *rest, **options),
    )
    monkeypatch.setattr(security, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))
    yield f"http://public.example:{server.server_port}", hosts
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_public_address_is_fetched_from_what_was_checked(web):
    url, hosts = web
    assert fetch(f"{url}/a.png?x=1", 1000, 10) == b"x" * 1000
    assert hosts == [url.removeprefix("http://")]
    with pytest.raises(OSError, match="more than 999 bytes"):
        fetch(f"{url}/a.png?x=1", 999, 10)
    with pytest.raises(OSError, match="status 404"):
        fetch(f"{url}/b.png", 1000, 10)


def test_redirections_are_checked_too(web):
    url, _ = web
    assert fetch(f"{url}/to=/a.png?x=1", 1000, 10) == b"x" * 1000
    with pytest.raises(ValueError, match="not a public one"):
        fetch(f"{url}/to=http://private.example/", 1000, 10)
    with pytest.raises(ValueError, match="only http and https"):
        fetch(f"{url}/to=file:///etc/passwd", 1000, 10)
    with pytest.raises(OSError, match="redirected more than 3 times"):
        fetch(f"{url}/to", 1000, 10)
