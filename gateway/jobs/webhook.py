"""Webhooks: which URLs may be called, how a body is signed, and one call. Only what the operator allowed is ever called.

A host's name is resolved once for a call and the call goes to that address, which must be allowed too: a name cannot
be made to mean another machine in between. Redirects are not followed, proxies not used, bodies of answers not read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias
from urllib.parse import SplitResult, urlsplit

from gateway.errors import InvalidArgument

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
_LONGEST = 2048
_PORTS = {"http": 80, "https": 443}
_CONNECT, _TOTAL = 5.0, 15.0  # seconds
_RETRIED = frozenset((408, 425, 429))
_PURPOSE = b"lockgate webhook 1"


class WebhookPolicy:
    """What `--webhook-allow` says: `HOST` or `HOST:PORT` for https, `http://HOST[:PORT]` for http, and networks.

    A name must stand for public addresses, or for such in a network given as `10.0.0.0/8`; an address may be given for
    a name, and is then allowed as it is. Raises InvalidArgument for an entry that is none of these.
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        self._origins: set[tuple[str, str, int]] = set()
        self._networks: list[Network] = []
        for entry in allowed:
            self._add(entry)

    def _add(self, entry: str) -> None:
        try:
            if "/" in entry and "://" not in entry:
                self._networks.append(ipaddress.ip_network(entry))
                return
            self._origins.add(_origin(urlsplit(entry if "://" in entry else f"https://{entry}"), bare=True))
        except ValueError as problem:
            raise InvalidArgument(
                f"--webhook-allow {entry}: {problem}; expected HOST, HOST:PORT, http://HOST[:PORT] or a network such as "
                "10.0.0.0/8"
            ) from None

    def __bool__(self) -> bool:
        return bool(self._origins)

    def check(self, url: str) -> None:
        """Raises InvalidArgument for a URL that may not be called."""
        if not self._origins:
            raise InvalidArgument("callbacks are off; have the server started with --webhook-allow HOST")
        try:
            origin = _origin(urlsplit(_plain(url)))
        except ValueError as problem:
            raise InvalidArgument(f"the callback is not a URL that can be called: {problem}") from None
        if origin not in self._origins:
            scheme, host, port = origin
            raise InvalidArgument(
                f"the callback's {scheme}://{host}:{port} is not allowed; have the server started with --webhook-allow "
                + (f"{host}:{port}" if scheme == "https" else f"http://{host}:{port}")
            )

    def allows_address(self, host: str, address: str) -> bool:
        """Whether a host that is allowed may be called at this address."""
        number = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(number, ipaddress.IPv6Address) and number.ipv4_mapped:
            number = number.ipv4_mapped
        if host == address or any(number in network for network in self._networks):
            return True
        return number.is_loopback if host == "localhost" else number.is_global and not number.is_multicast


class WebhookKey:
    """Signs webhooks. Its key is made from the deployment's, so that whoever checks signatures cannot forge messages."""

    def __init__(self, deployment_key: bytes) -> None:
        self._key = hmac.digest(deployment_key, _PURPOSE, hashlib.sha256)
        self.text = self._key.hex()  # what receivers are given

    def headers(self, body: bytes, timestamp: int) -> dict[str, str]:
        """The headers that go with a body sent at this time (seconds since 1970)."""
        signed = b"%d.%b" % (timestamp, body)
        signature = hmac.new(self.text.encode(), signed, hashlib.sha256).hexdigest()
        return {"lockgate-timestamp": str(timestamp), "lockgate-signature": f"v1={signature}"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call went: delivered, or why not and whether to try again."""

    delivered: bool
    reason: str = ""
    again: bool = False


class Caller:
    """Makes the calls; an async context manager around one HTTP client."""

    def __init__(self, policy: WebhookPolicy, key: WebhookKey) -> None:
        self._policy = policy
        self._key = key

    async def __aenter__(self) -> Self:
        self._client = await asyncio.to_thread(_http_client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def call(self, url: str, body: bytes, timestamp: int) -> Outcome:
        """POST a signed JSON body once."""
        import httpx

        try:
            # Again, because what was allowed when the job was submitted may not be any more.
            self._policy.check(url)
            async with asyncio.timeout(_TOTAL):
                parts = urlsplit(url)
                scheme, host, port = _origin(parts)
                address = await self._resolve(host, port)
                headers = {"host": parts.netloc, "content-type": "application/json", "user-agent": "lockgate"}
                request = self._client.build_request(
                    "POST",
                    parts._replace(netloc=f"{_bracketed(address)}:{port}").geturl(),
                    content=body,
                    headers=headers | self._key.headers(body, timestamp),
                    extensions={"sni_hostname": host} if scheme == "https" else {},
                )
                response = await self._client.send(request, stream=True)
                await response.aclose()
        except InvalidArgument as problem:
            return Outcome(delivered=False, reason=problem.message)
        except TimeoutError:
            return Outcome(delivered=False, reason=f"no answer within {_TOTAL:g} s", again=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as problem:
            return Outcome(delivered=False, reason=f"{type(problem).__name__}: {problem}"[:200], again=True)
        return _judged(response.status_code)

    async def _resolve(self, host: str, port: int) -> str:
        """The address to call, the first one that is allowed. Raises InvalidArgument when none is, OSError."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for *_, (address, *_) in found:
            if self._policy.allows_address(host, str(address)):
                return str(address)
        raise InvalidArgument(
            f"'{host}' has no address that may be called: public ones may, and those of a network given by --webhook-allow"
        )


def _judged(status: int) -> Outcome:
    if 200 <= status < 300:
        return Outcome(delivered=True)
    reason = f"status {status}" + (", and redirects are not followed" if 300 <= status < 400 else "")
    return Outcome(delivered=False, reason=reason, again=status >= 500 or status in _RETRIED)


def _trusted() -> Any:
    import httpx

    return httpx.create_ssl_context()  # SSL_CERT_FILE may name the authorities


def _http_client() -> Any:
    # Imported and made on a thread: it reads the certificates of all authorities, some 50 ms.
    import httpx

    return httpx.AsyncClient(
        verify=_trusted(),
        timeout=httpx.Timeout(_TOTAL, connect=_CONNECT),
        follow_redirects=False,
        trust_env=False,
        limits=httpx.Limits(max_connections=32, max_keepalive_connections=0),
    )


def _plain(url: str) -> str:
    if len(url) > _LONGEST or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"it must have at most {_LONGEST} printable ASCII characters and no spaces")
    return url


def _origin(url: SplitResult, *, bare: bool = False) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError for what is no plain http URL; `bare` allows nothing behind the port."""
    if url.scheme not in _PORTS or not url.hostname:
        raise ValueError("expected http://HOST or https://HOST")
    if url.username is not None or url.password is not None or url.fragment:
        raise ValueError("it has a user, a password or a fragment")
    if bare and (url.path not in ("", "/") or url.query):
        raise ValueError("a path cannot be given")
    return url.scheme, url.hostname.rstrip("."), url.port or _PORTS[url.scheme]


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
