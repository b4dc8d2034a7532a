"""What `config.pbtxt` says of a remote server: the parameters that begin with `remote.`, read and checked once.

Files they name (token, certificates) are read here too, so that nothing later depends on the disk. Blocking.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gateway import errors

_PREFIX = "remote."
_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DEFAULTS = {
    "url": "",
    "model": "",
    "version": "",
    "token_file": "",
    "ca_file": "",
    "cert_file": "",
    "key_file": "",
    "timeout_ms": "30000",
    "connect_timeout_ms": "1000",
    "concurrency": "64",
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where one server listens; `path` is what stands before `/v2` on HTTP."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def name(self) -> str:
        """`host:port`, as clients, logs and metrics are told."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken there."""
        return self.scheme.endswith("s")


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files' contents: whom to trust (empty: the system's authorities), and who we are (empty: nobody).

    `context` is the same for Python's ssl, where TLS is spoken at all.
    """

    authorities: bytes
    chain: bytes
    key: bytes
    context: ssl.SSLContext | None


@dataclass(frozen=True, slots=True)
class Options:
    """All that is known of a model's remote. Times are seconds."""

    name: str  # of the model here
    addresses: tuple[Address, ...]  # equals, all of one scheme
    model: str  # its name there
    version: str  # empty: the newest there
    token: str
    certificates: Certificates
    timeout: float  # of a request without a deadline
    connect_timeout: float
    concurrency: int  # the most requests on their way at once, to each server

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know though it works."""
        bare = [each.name for each in self.addresses if not each.secure and each.host not in _LOOPBACK]
        if self.token and bare:
            return (f"the token for {', '.join(bare)} travels unencrypted; use https:// or grpcs:// in remote.url",)
        return ()


def read(model: str, parameters: Mapping[str, str]) -> Options:
    """The options of a model with these parameters. Raises `InvalidArgument` saying what to correct."""
    given = {key.removeprefix(_PREFIX): value for key, value in parameters.items() if key.startswith(_PREFIX)}
    for key in given.keys() - _DEFAULTS.keys():
        raise _wrong(model, key, f"is not known; there are: {', '.join(_PREFIX + name for name in _DEFAULTS)}")
    said = {**_DEFAULTS, **given}
    addresses = tuple(_address(model, url) for url in said["url"].replace(",", " ").split())
    if not addresses:
        raise _wrong(model, "url", "must say where the server is, e.g. grpc://10.0.0.7:8001 or https://gateway.example")
    if len({each.scheme for each in addresses}) > 1:
        raise _wrong(model, "url", "has servers of different kinds; give all of them the same scheme")
    if bool(said["cert_file"]) != bool(said["key_file"]):
        raise _wrong(model, "cert_file", "and remote.key_file belong together; give both or none")
    return Options(
        name=model,
        addresses=addresses,
        model=said["model"] or model,
        version=said["version"],
        token=_file(model, "token_file", said).decode().strip(),
        certificates=_certificates(model, said, secure=addresses[0].secure),
        timeout=_number(model, "timeout_ms", said) / 1e3,
        connect_timeout=_number(model, "connect_timeout_ms", said) / 1e3,
        concurrency=_number(model, "concurrency", said),
    )


def _address(model: str, url: str) -> Address:
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        scheme, host, port = "", None, None
    if scheme not in _PORTS or not host or parts.query or parts.fragment:
        raise _wrong(model, "url", f"must be grpc://, grpcs://, http:// or https:// and a host and port, got '{url}'")
    if parts.username is not None:
        raise _wrong(model, "url", "must hold no user or password; put a token into a file and name it in token_file")
    path = parts.path.rstrip("/")
    if path and scheme.startswith("grpc"):
        raise _wrong(model, "url", f"has a path, which gRPC has no word for: '{url}'")
    return Address(scheme, host, port or _PORTS[scheme], path)


def _certificates(model: str, said: Mapping[str, str], *, secure: bool) -> Certificates:
    authorities, chain, key = (_file(model, name, said) for name in ("ca_file", "cert_file", "key_file"))
    context = None
    if secure:
        try:
            context = ssl.create_default_context(cadata=authorities.decode() or None)
            if chain:
                context.load_cert_chain(said["cert_file"], said["key_file"])
        except (ssl.SSLError, UnicodeDecodeError):
            raise _wrong(model, "ca_file", "or the certificate or key is no PEM file of its kind") from None
    return Certificates(authorities, chain, key, context)


def _file(model: str, key: str, said: Mapping[str, str]) -> bytes:
    if not said[key]:
        return b""
    try:
        return Path(said[key]).read_bytes()
    except OSError as problem:
        raise _wrong(model, key, f"cannot be read: {problem.strerror}") from None


def _number(model: str, key: str, said: Mapping[str, str]) -> int:
    if not said[key].isdecimal() or not 0 < int(said[key]) < 1 << 31:
        raise _wrong(model, key, f"must be a whole number above 0, got '{said[key]}'")
    return int(said[key])


def _wrong(model: str, key: str, text: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"parameter {_PREFIX}{key} of model '{model}' {text}; correct it in config.pbtxt")
