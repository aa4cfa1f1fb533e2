"""Who is answered, where the server listens, and which addresses it fetches pictures from."""

from __future__ import annotations

import hmac
import http.client
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from siglip_hf.files import read_text, sha256, text_lines

#: Environment variable with keys, separated by commas.
KEYS_VARIABLE = "SIGLIP_HF_API_KEYS"
_SHORTEST_KEY = 16
_REDIRECTS = 3
_FETCH_BLOCK = 1 << 16
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # any address of IPv4, through a gateway


def read_keys(file: str | os.PathLike[str] | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """API keys from a file, a key on each line, and from the environment.

    Args:
        file: the file; lines that are empty or begin with # do not count.
        environment: variables, of which `SIGLIP_HF_API_KEYS` is read.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a key is short enough to be guessed, or the file holds none.
    """
    lines = [line.strip() for line in text_lines(read_text(file))] if file is not None else []
    keys = [line for line in lines if line and not line.startswith("#")]
    if file is not None and not keys:
        raise ValueError(f"{file} holds no key; write one on each line.")
    keys += [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    for number, key in enumerate(keys, 1):
        if len(key) < _SHORTEST_KEY or not key.isascii():
            raise ValueError(f"API key number {number} must have {_SHORTEST_KEY} or more letters, digits and signs.")
    return tuple(dict.fromkeys(keys))


def client_of(authorization: bytes, keys: Sequence[str]) -> str | None:
    """A name for the client that sent a header `Authorization: Bearer KEY`; None if the key is none of `keys`.

    All keys are compared, each in constant time, so that the time says nothing of any of them.
    """
    scheme, _, given = authorization.partition(b" ")
    given = given.strip() if scheme.lower() == b"bearer" else b""
    found = [hmac.compare_digest(given, key.encode()) for key in keys]
    return f"key {sha256([given])[:8]}" if any(found) else None


def check_exposure(host: str, keys: Sequence[str], insecure: bool) -> None:
    """Refuses to listen beyond this machine for everyone, unless that is wanted.

    Raises:
        ValueError: with what to do.
    """
    if not (keys or insecure or _is_loopback(host)):
        raise ValueError(
            f"--host {host} would let everyone who reaches this machine use it; give keys (--api-key FILE or "
            f"{KEYS_VARIABLE}), or say --insecure."
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def fetch(url: str, most: int, timeout: float) -> bytes:
    """The content of a public http(s) address.

    The name is resolved once, all its addresses must be public, and the connection goes to what was checked; so a name
    that resolves otherwise the second time does not matter. Redirections are followed under the same rule.

    Args:
        url: the address.
        most: bytes.
        timeout: seconds for all of it.

    Raises:
        OSError: if it cannot be fetched, without its content.
        ValueError: for an address that is not fetched.
    """
    end = time.monotonic() + timeout
    for _ in range(_REDIRECTS + 1):
        connection = _connection(url, end)
        try:
            parts = urlsplit(url)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request(
                "GET", path, headers={"Host": parts.netloc.rpartition("@")[2], "User-Agent": "siglip-hf"}
            )
            reply = connection.getresponse()
            if reply.status in (301, 302, 303, 307, 308):
                url = urljoin(url, reply.headers.get("Location", ""))
                continue
            if reply.status != 200:
                raise OSError(f"the address answered with status {reply.status}")
            return _content(reply, most, end)
        except http.client.HTTPException as error:
            raise OSError("the address gave no answer of HTTP") from error
        finally:
            connection.close()
    raise OSError(f"the address redirected more than {_REDIRECTS} times")


def _content(reply: http.client.HTTPResponse, most: int, end: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    while block := reply.read1(_FETCH_BLOCK):
        parts.append(block)
        size += len(block)
        if size > most:
            raise OSError(f"it has more than {most:,} bytes, the most that is taken")
        if time.monotonic() > end:
            raise OSError("it takes too long to arrive")
    return b"".join(parts)


def _connection(url: str, end: float) -> http.client.HTTPConnection:
    """A connection to the address of a URL, which is a public one."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError as error:
        raise ValueError("this is no address") from error
    if scheme not in ("http", "https") or not host or not url.isascii() or any(mark.isspace() for mark in url):
        raise ValueError("only http and https addresses are fetched")
    port = port or (443 if scheme == "https" else 80)
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise OSError("the name of the address is not known") from error
    for address in found:
        if not _is_public(str(address)):
            raise ValueError("the address is not a public one")
    left = max(end - time.monotonic(), 0.001)
    try:
        plain = socket.create_connection((str(found[0]), port), timeout=left)
        connection = http.client.HTTPConnection(host, port, timeout=left)
        connection.sock = plain
        if scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except OSError as error:
        raise OSError("the address cannot be reached") from error
    return connection


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    # An IPv4 address may be written as one of IPv6.
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None) or found
    is_translated = found.version == 6 and found in _TRANSLATED
    return inner.is_global and not (inner.is_multicast or inner.is_reserved or is_translated)


def key_file_warning(file: str | os.PathLike[str]) -> str | None:
    """What to say if others on this machine can read the file of keys."""
    readable = os.name == "posix" and Path(file).stat().st_mode & 0o077
    return f"{file} can be read by others on this machine; chmod 600 {file}" if readable else None
