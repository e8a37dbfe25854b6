"""Addresses of servers: which ones a teacher may have, and which ones a key may be sent to.

What is refused is what would send requests, or the key in them, somewhere else than a reader of the config expects.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator, Sequence
from urllib.parse import SplitResult, urlsplit

from kdtrain.config.tree import KeyPath, Problem

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Where clouds hand out credentials of the machine itself, beside 169.254.0.0/16 and fe80::/10.
_METADATA_ADDRESSES = {
    ipaddress.ip_address(text)
    for text in (
        "100.100.100.200",  # Alibaba
        "192.0.0.192",  # Oracle
        "168.63.129.16",  # Azure
        "fd00:ec2::254",  # AWS
        "fd20:ce::254",  # Google
    )
}
_METADATA_NAMES = {"metadata", "metadata.goog", "instance-data", "metadata.tencentyun.com"}
_METADATA_DOMAINS = (".metadata.goog", ".google.internal", ".ec2.internal", ".azure.internal")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ROUTES = ("/chat/completions", "/completions", "/models")
_METADATA = "this is an address where clouds hand out credentials, or a link-local one, not a teacher"


def check_server_urls(path: KeyPath, urls: Sequence[str], *, with_key: bool) -> Iterator[Problem]:
    """What is wrong with a teacher's addresses, each at `(*path, index)`.

    Args:
        with_key: whether requests carry a key. It is sent encrypted, or within this machine.
    """
    seen: set[str] = set()
    for index, url in enumerate(urls):
        problem = _problem(url, with_key)
        if problem is None and url.rstrip("/") in seen:
            problem = ("this server is already in the list", "name each server once")
        seen.add(url.rstrip("/"))
        if problem is not None:
            yield Problem((*path, index), *problem)
        elif urlsplit(url).path in ("", "/"):
            hint = f"most servers have their API under /v1: {url.rstrip('/')}/v1"
            yield Problem((*path, index), "the address has no path", hint, level="warning")


def _problem(url: str, with_key: bool) -> tuple[str, str] | None:
    """Message and hint. Neither repeats the address, which may have a password in it."""
    example = "write it as http://127.0.0.1:8000/v1"
    # urlsplit drops tabs and line breaks and reads a backslash otherwise than HTTP clients do.
    if not url.isascii() or not url.isprintable() or re.search(r"[\s\\]", url):
        return "an address has printable ASCII characters only, and no space or backslash", example
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "this is not an address: its host or port cannot be read", example
    if parts.scheme not in ("http", "https"):
        return "a server's address begins with http:// or https://", example
    if "@" in parts.netloc:
        hint = "leave it out; a teacher's key is in the variable that rlhf.teacher.api_key_env names"
        return "a user or password in an address ends up in logs", hint
    if not host or port == 0 or "%" in parts.netloc:
        return "the address has no usable host or port", example
    if "?" in url or "#" in url:
        return "an address of an API has no query and no fragment", "leave out what begins with ? or #"
    return _problem_of_host(host) or _problem_of_route(parts) or (_problem_of_key(parts) if with_key else None)


def _problem_of_host(host: str) -> tuple[str, str] | None:
    address, name = _address(host), host.rstrip(".")
    named = name in _METADATA_NAMES or name.endswith(_METADATA_DOMAINS)
    if named or (address is not None and is_metadata_address(address)):
        return _METADATA, "name the server that the model runs on"
    return None


def _problem_of_route(parts: SplitResult) -> tuple[str, str] | None:
    path = parts.path.rstrip("/")
    found = next((route for route in _ROUTES if path.endswith(route)), None)
    if found is None:
        return None
    return f"the address is that of one route ({found})", f"leave {found} out: it is added where it is needed"


def _problem_of_key(parts: SplitResult) -> tuple[str, str] | None:
    if parts.scheme == "https" or is_loopback(parts.hostname or ""):
        return None
    return (
        "a key would be sent unencrypted to another machine",
        "use https, or an SSH tunnel to a port of 127.0.0.1, or remove api_key_env",
    )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: `localhost`, 127.0.0.0/8, ::1."""
    address = _address(host)
    return host == "localhost" if address is None else _forms(address)[-1].is_loopback


def is_metadata_address(address: IPAddress) -> bool:
    """Whether clouds hand out credentials there, in any form of the address; link-local ones count as such."""
    return any(form.is_link_local or form in _METADATA_ADDRESSES for form in _forms(address))


def _address(host: str) -> IPAddress | None:
    """The address that a host is, in every spelling that a resolver takes (`0xa9fea9fe`, `2852039166`, `127.1`)."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        return None


def _forms(address: IPAddress) -> list[IPAddress]:
    """An address, and the IPv4 one inside it last."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and (address in _NAT64 or 1 < int(address) < 2**32):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return [address] if inner is None else [address, inner]
