"""Who calls: bearer tokens from a file, or a header that a trusted proxy sets; shared by HTTP and gRPC.

Knows the tokens only as SHA-256 digests, so finding one takes the same time whatever was sent. Does not
decide what a caller may do: it gives the tenant's name and no more.
"""

from __future__ import annotations

import hashlib
import logging
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from gateway.errors import InvalidArgument, Unauthenticated
from gateway.telemetry import log_event

MIN_TOKEN_LENGTH = 16
MAX_TENANT_LENGTH = 128

Header: TypeAlias = Callable[[str], str | None]
"""A request's headers or metadata: the value of one by its lower-case name, or None."""


class Tokens:
    """The tokens in force, each of one tenant; a tenant may have several, so that one can be replaced."""

    def __init__(self, tenants: Mapping[str, str]) -> None:
        """`tenants` maps each token to its tenant."""
        self._tenants = {_digest(token): tenant for token, tenant in tenants.items()}

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read a file of `tenant:token` lines; blank lines and lines that start with # are skipped.

        Raises OSError if it cannot be read and ValueError, which names the line and shows no token, for a bad
        one. Warns in the log when others than the owner may read the file.
        """
        if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            log_event("token_file_exposed", logging.WARNING, file=path.name, remedy=f"chmod 600 {path.name}")
        tenants: dict[str, str] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            tenant, token = _entry(entry, f"{path.name}:{number}")
            if token in tenants:
                raise ValueError(f"{path.name}:{number}: this token is on an earlier line too; give each its own")
            tenants[token] = tenant
        if not tenants:
            raise ValueError(f"{path.name} has no tokens; write at least one line 'tenant:token'")
        return cls(tenants)

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an `Authorization` header or metadata value. Raises `Unauthenticated`."""
        if authorization is None:
            raise Unauthenticated("this server needs a token; send the header 'Authorization: Bearer <token>'")
        scheme, _, token = authorization.partition(" ")
        tenant = self._tenants.get(_digest(token.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise Unauthenticated("the token is not known to this server; expected 'Authorization: Bearer <token>'")
        return tenant


class Callers:
    """Which tenant a request is from: its token's, else the one its header names, else "", the default tenant."""

    def __init__(self, tokens: Tokens | None = None, header: str = "") -> None:
        """Without `tokens` everybody may call. `header` is one that a proxy sets; whatever it says is believed."""
        self._tokens = tokens
        self._header = header.lower()
        self.welcome = tokens is None  # everybody may call
        self.anonymous = tokens is None and not header  # everybody is the default tenant: no need to ask

    def tenant(self, header: Header) -> str:
        """The tenant of a request with these headers. Raises `Unauthenticated`, `InvalidArgument`."""
        if self._tokens is not None:
            return self._tokens.tenant(header("authorization"))
        return self._named(header(self._header)) if self._header else ""

    def _named(self, tenant: str | None) -> str:
        name = (tenant or "").strip()
        if len(name) > MAX_TENANT_LENGTH or not name.isprintable():
            raise InvalidArgument(
                f"the header '{self._header}' must name a tenant in at most {MAX_TENANT_LENGTH} printable characters, "
                f"got {len(name)}"
            )
        return name


def _entry(entry: str, where: str) -> tuple[str, str]:
    tenant, colon, token = (part.strip() for part in entry.partition(":"))
    if not colon or not tenant:
        raise ValueError(f"{where}: expected 'tenant:token'")
    if len(token) < MIN_TOKEN_LENGTH:
        raise ValueError(
            f"{where}: the token of '{tenant}' has {len(token)} characters, fewer than {MIN_TOKEN_LENGTH}; "
            "make one with: openssl rand -hex 32"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{where}: the token of '{tenant}' may have printable ASCII characters only and no spaces")
    return tenant, token


def _digest(token: str) -> bytes:
    # What a client sends need not be valid text; it must not raise, only match nothing.
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()
