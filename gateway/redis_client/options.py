"""`RedisOptions`: which Redis, who we are there, and how long we wait. Reads URLs, password files and TLS files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import ParseResult, parse_qsl, unquote, urlparse

from gateway.errors import InvalidArgument

Kind: TypeAlias = Literal["single", "sentinel", "cluster"]
_FORMS = (
    "redis://[user:password@]host[:port][/db], rediss:// for TLS, unix:///path/to/socket[?db=0], "
    "redis+sentinel://host:port,host:port/service[/db] or redis+cluster://host:port,host:port"
)
_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("single", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_PORTS: dict[Kind, int] = {"single": 6379, "sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True, slots=True)
class Address:
    """A host and port, or a unix socket when `path` is set."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL says. `addresses` are the server's, the sentinels' or some of the cluster's."""

    kind: Kind
    addresses: tuple[Address, ...]
    tls: bool = False
    db: int = 0
    service: str = ""
    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """Which Redis, and how to treat it. Times are seconds; raises InvalidArgument for a URL that says nothing useful.

    The password file wins over the URL's password, and is read at each connection, so that a rotated password works.
    Without `ca_file` a rediss:// server's certificate is checked against the system's authorities.
    """

    url: str = field(repr=False)
    prefix: str = "lockgate"
    username: str = ""
    password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    connect_timeout: float = 2.0
    call_timeout: float = 5.0

    def __post_init__(self) -> None:
        parse_url(self.url)
        if not self.prefix or set(self.prefix) & set("{} \r\n"):
            raise InvalidArgument(f"the queue prefix '{self.prefix}' must be a word without braces or spaces")

    @property
    def target(self) -> Target:
        """What the URL says."""
        return parse_url(self.url)

    def login(self) -> tuple[str, str]:
        """User name and password, either empty. Raises InvalidArgument when the password file cannot be read."""
        target = self.target
        password = target.password
        if self.password_file is not None:
            try:
                password = self.password_file.read_text().strip("\r\n")
            except (OSError, ValueError) as problem:
                raise InvalidArgument(f"cannot read the queue's password file: {problem}") from None
        return self.username or target.username, password

    def tls(self) -> ssl.SSLContext | None:
        """How to check the server, and who we are to it; None where the URL asks for no TLS."""
        if not self.target.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file)
        except OSError as problem:  # `ssl.SSLError` is one
            raise InvalidArgument(f"cannot use the queue's TLS files: {problem}") from None
        return context


def parse_url(url: str) -> Target:
    """Read a URL; raises InvalidArgument which says what was wrong and which forms there are."""
    parts = urlparse(url)
    if parts.scheme not in _SCHEMES or not url.startswith(f"{parts.scheme}://"):
        raise _wrong(url, "it does not begin with one of the schemes followed by //")
    kind, tls = _SCHEMES[parts.scheme]
    try:
        username, password, hosts = _authority(parts)
        if parts.scheme == "unix":
            return _unix(url, parts, hosts, username, password)
        addresses = tuple(_address(host, _PORTS[kind]) for host in hosts.split(","))
        service, db = _path(kind, [unquote(part) for part in parts.path.split("/") if part])
        _check(kind, parts, addresses)
    except ValueError as problem:
        raise _wrong(url, str(problem)) from None
    return Target(kind, addresses, tls, db, service, username, password)


def _authority(parts: ParseResult) -> tuple[str, str, str]:
    """User name, password and the hosts as written."""
    user, _, hosts = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    return unquote(name), unquote(password), hosts


def _unix(url: str, parts: ParseResult, hosts: str, username: str, password: str) -> Target:
    if hosts or not parts.path.strip("/"):
        raise _wrong(url, "a unix socket needs an absolute path: three slashes")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    db = _db(query.pop("db", "0"))
    if query:
        raise ValueError(f"'{min(query)}' is not understood; a unix socket takes only db")
    return Target("single", (Address(path=unquote(parts.path)),), False, db, "", username, password)


def _check(kind: Kind, parts: ParseResult, addresses: tuple[Address, ...]) -> None:
    if parts.query or parts.fragment:
        raise ValueError("what follows ? or # is not understood")
    if kind == "single" and len(addresses) != 1:
        raise ValueError("it names several hosts; use redis+sentinel:// or redis+cluster://")


def _address(text: str, default_port: int) -> Address:
    # urlparse knows brackets and ports, and one host at a time.
    one = urlparse(f"//{text}")
    if not one.hostname:
        raise ValueError("a host is missing")
    return Address(one.hostname, one.port or default_port)


def _path(kind: Kind, words: list[str]) -> tuple[str, int]:
    """The service and the database after the hosts."""
    service = ""
    if kind == "sentinel":
        if not words:
            raise ValueError("the name of the sentinels' service is missing")
        service = words.pop(0)
    db = _db(words.pop(0)) if words else 0
    if words:
        raise ValueError(f"'{words[0]}' after the database is not understood")
    if kind == "cluster" and db:
        raise ValueError("a cluster has only database 0")
    return service, db


def _db(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"the database '{text}' is not a number")
    return int(text)


def _wrong(url: str, why: str) -> InvalidArgument:
    shown = url.rpartition("@")[2]  # never a password
    return InvalidArgument(f"the queue URL '{shown}' cannot be used: {why}. Expected {_FORMS}")
