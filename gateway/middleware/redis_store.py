"""Stores in Redis, which all gateways of a fleet share: one with claims, and one with this process's memory before it.

A claim is a record that lives three seconds and is renewed for as long as its run goes on, so that when a process dies
the next one to ask gets it. A run elsewhere is looked at every 5 to 50 ms, by one request of each process. What a
process has in Redis at a time is bounded in bytes, because the queue lives there too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from redis.exceptions import RedisError

from gateway import errors
from gateway.message import BadMessage
from gateway.middleware.records import Records
from gateway.middleware.store import Kept, MemoryStore, size_of
from gateway.queues.redis.seal import Seal
from gateway.redis_client import RedisClient, unheeded
from gateway.telemetry import log_event

LEASE = 3.0  # seconds that a claim outlives its process
_RENEWAL = 1.0
_PATIENCE = 1.0  # seconds that Redis has for an answer
_FIRST_LOOK, _LAST_LOOK = 0.005, 0.05  # seconds between looks at a run elsewhere
_SHORT_PATIENCE = 0.05  # seconds, where Redis can be done without
_REST = 1.0  # seconds that it is then left alone
_NEAR = 600.0  # seconds that what was found in Redis is kept here
_LARGEST = 256 << 10  # bytes of a cached response that is shared: a larger one would hold up the queue


class _Claim:
    """A key that is this process's until it is put or released, or its lease is over."""

    __slots__ = ("name", "until")

    def __init__(self, name: str, until: float) -> None:
        self.name = name
        self.until = until  # by our clock, and not after Redis lets it go


class RedisStore:
    """A `ClaimStore`; an async context manager, to be open while claims are made."""

    def __init__(
        self,
        client: RedisClient,
        name: Callable[[str], str],
        seal: Seal,
        max_bytes: int,
        patience: float = _PATIENCE,
    ) -> None:
        """`name` gives the name of a key in hexadecimal; `max_bytes` is what this process may have there at a time."""
        self.bytes = 0
        self._client = client
        self._name = name
        self._records = Records(seal)
        self._max_bytes = max_bytes
        self._patience = patience
        self._claims: dict[bytes, _Claim] = {}
        self._claimed = asyncio.Event()
        self._there: deque[tuple[float, int]] = deque()  # until when, and how many bytes
        self._troubled = False
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._renewing = self._group.create_task(self._renew(), name="claims")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._renewing.cancel()
        if not isinstance(error, asyncio.CancelledError):
            kind = error = trace = None  # the group would wrap an error of the block, which is none of its business
        await self._group.__aexit__(kind, error, trace)

    async def get(self, key: bytes) -> Kept | None:
        """See `Store.get`."""
        try:
            return await self.look(key)
        except errors.Unavailable as problem:
            self.trouble(problem)
            return None

    async def look(self, key: bytes) -> Kept | None:
        """As `get`, but raises `Unavailable` when nobody can tell."""
        name = self._name(key.hex())
        found = await self._reply(self._call("GET", name))
        return None if found is None else self._unpack(name, found)

    async def put(self, key: bytes, kept: Kept, seconds: float) -> None:
        """See `Store.put`."""
        sent = self.offer(key, kept, seconds)
        if sent is not None:
            try:
                await self._reply(sent)
            except errors.Unavailable as problem:
                self.trouble(problem)

    def offer(self, key: bytes, kept: Kept, seconds: float) -> asyncio.Future[Any] | None:
        """As `put`, without waiting for Redis. None where there is no room."""
        name, now = self._name(key.hex()), time.monotonic()
        claim = self._claims.pop(key, None)
        value = self._packed(name, kept)
        if not self._reserve(len(value), now, seconds):
            self.trouble(errors.Unavailable(f"this process has {self.bytes} bytes of answers in Redis, its share"))
            if not kept.body:
                return None
            value = self._records.pack(name, Kept(kept.body))  # so that another body is still told from this one
        # A claim that is over may be another's by now, whose record is not ours to write over.
        new = () if claim is not None and now < claim.until else ("NX",)
        return self._call("SET", name, value, "PX", int(seconds * 1000), *new)

    async def claim(self, key: bytes, body: bytes) -> Kept | None:
        """See `ClaimStore.claim`."""
        name, until = self._name(key.hex()), time.monotonic() + LEASE
        pending = self._records.pending(name, body)
        setting = self._call("SET", name, pending, "NX", "PX", int(LEASE * 1000))
        getting = self._call("GET", name)
        try:
            found = await self._reply(getting)
            if found is None:
                await self._reply(setting)  # it says why nothing is there
            kept = Kept(body, pending=True) if found in (None, pending) else self._unpack(name, found)
        except asyncio.CancelledError:
            getting.add_done_callback(partial(self._give_back, name, pending))
            raise
        except errors.Unavailable as problem:
            getting.add_done_callback(partial(self._give_back, name, pending))
            raise errors.keys_unavailable(problem.message, problem.retry_after) from None
        if found == pending:
            self._claims[key] = _Claim(name, until)
            self._claimed.set()
            return None
        return kept  # pending, if what was there is gone again: to be asked for once more

    def release(self, key: bytes) -> None:
        """See `ClaimStore.release`."""
        claim = self._claims.pop(key, None)
        if claim is not None and time.monotonic() < claim.until:
            self._call("DEL", claim.name)

    async def settled(self, key: bytes) -> None:
        """See `ClaimStore.settled`."""
        delay = _FIRST_LOOK
        kept: Kept | None = Kept(b"", pending=True)
        while kept is not None and kept.pending:
            await asyncio.sleep(delay)  # another process's run has no event here
            kept = await self.get(key)
            delay = min(2 * delay, _LAST_LOOK)

    def trouble(self, problem: errors.GatewayError) -> None:
        """Say once, until Redis answers again, that an answer was not kept or found."""
        if not self._troubled:
            self._troubled = True
            log_event("answers_not_shared", logging.WARNING, reason=problem.message)

    def _packed(self, name: str, kept: Kept) -> bytes:
        try:
            return self._records.pack(name, kept)
        except errors.Internal as problem:
            self.trouble(problem)
            return self._records.pack(name, Kept(kept.body))

    def _unpack(self, name: str, value: bytes) -> Kept:
        try:
            return self._records.unpack(name, value)
        except BadMessage as problem:
            raise errors.Unavailable(f"what Redis has under its key cannot be read: {problem.message}") from None

    def _reserve(self, size: int, now: float, seconds: float) -> bool:
        while self._there and self._there[0][0] <= now:
            self.bytes -= self._there.popleft()[1]
        if self.bytes + size > self._max_bytes:
            return False
        self.bytes += size
        self._there.append((now + seconds, size))
        return True

    # --- claims

    async def _renew(self) -> None:
        while True:
            await self._claimed.wait()
            await asyncio.sleep(_RENEWAL)
            now = time.monotonic()
            for key, claim in list(self._claims.items()):
                if claim.until <= now:
                    del self._claims[key]
                else:
                    renewed = self._call("PEXPIRE", claim.name, int(LEASE * 1000))
                    renewed.add_done_callback(partial(self._renewed, key, claim, now + LEASE))
            if not self._claims:
                self._claimed.clear()

    def _renewed(self, key: bytes, claim: _Claim, until: float, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or done.exception() is not None:
            return
        if done.result():
            claim.until = until
        elif self._claims.get(key) is claim:
            del self._claims[key]  # lost, with what Redis held

    def _give_back(self, name: str, pending: bytes, done: asyncio.Future[Any]) -> None:
        """Nobody waits for this claim any more, if it was given."""
        if not done.cancelled() and done.exception() is None and done.result() == pending:
            self._call("DEL", name)

    # --- calls

    def _call(self, *command: str | bytes | int) -> asyncio.Future[Any]:
        done = self._client.call(*command)
        done.add_done_callback(unheeded)
        return done

    async def _reply(self, done: asyncio.Future[Any]) -> Any:
        """The reply, if it comes in time. Raises `Unavailable`."""
        await asyncio.wait([done], timeout=self._patience)
        if not done.done():
            raise errors.Unavailable(f"Redis did not answer for {self._patience:g} s")
        try:
            reply = done.result()
        except RedisError as problem:
            raise errors.Unavailable(f"Redis refused it: {problem}") from None
        self._troubled = False
        return reply


class SharedStore:
    """A `Store` for answers that can be computed again: in Redis, those of late in this process too.

    It does without Redis while that does not answer at once, and takes no claims.
    """

    def __init__(self, client: RedisClient, name: Callable[[str], str], seal: Seal, max_bytes: int) -> None:
        """As `RedisStore`; so many bytes are kept here, and as many there."""
        self._memory = MemoryStore(max_bytes)
        self._redis = RedisStore(client, name, seal, max_bytes, _SHORT_PATIENCE)
        self._again = 0.0  # when Redis may be asked

    async def get(self, key: bytes) -> Kept | None:
        """See `Store.get`."""
        kept = await self._memory.get(key)
        if kept is None and time.monotonic() >= self._again:
            try:
                kept = await self._redis.look(key)
            except errors.Unavailable as problem:
                self._redis.trouble(problem)
                self._again = time.monotonic() + _REST
            if kept is not None:
                await self._memory.put(key, kept, _NEAR)
        return kept

    async def put(self, key: bytes, kept: Kept, seconds: float) -> None:
        """See `Store.put`. Returns before Redis has it."""
        await self._memory.put(key, kept, seconds)
        if size_of(kept) <= _LARGEST and time.monotonic() >= self._again:
            self._redis.offer(key, kept, seconds)
