"""`Leases`: what the gateways do with jobs: take one, keep it, end it or hand it back, and find those whose gateway died.

A lease is a token in the record and a time in the index of the running. Whoever ends a run must still have its token
in the record, in the very transaction that ends it; that makes a job end once, whoever else ran it too.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway import errors
from gateway.jobs.guarded import Command, typed
from gateway.jobs.record import VERSION, Job, State, read
from gateway.jobs.store import JobStore, Packed
from gateway.message import pack_error

CRASHES = 3  # runs whose gateway died, after which a job is a dead letter
_NOT_OURS = 5.0  # seconds until a job is looked at again that only a newer release can read


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that this process has leased, and its packed request."""

    job: Job
    token: str
    request: Packed


class Leases:
    """The leases of one process, each of `seconds`."""

    def __init__(self, store: JobStore, seconds: float) -> None:
        self.seconds = seconds
        self._store = store
        self._client = store.client
        self._keys = store.keys

    async def due(self, limit: int) -> list[str]:
        """The jobs that may be run now, oldest first."""
        with typed():
            ids = await self._client.call(
                "ZRANGEBYSCORE", self._keys.jobs("queued"), "-inf", self._store.clock(), "LIMIT", 0, limit
            )
        return [each.decode() for each in ids]

    async def next_due(self) -> float | None:
        """In how many seconds the next queued job may be run; None when none is queued."""
        with typed():
            first = await self._client.call("ZRANGE", self._keys.jobs("queued"), 0, 0, "WITHSCORES")
        return float(first[1]) - self._store.clock() if first else None

    async def claim(self, name: str) -> Claim | None:
        """Lease a job; None when it was taken, ended, or is not for this release. An expired one is failed."""
        token = secrets.token_hex(16)
        claimed: Job | None = None

        def decide(replies: list[Any]) -> list[Command]:
            nonlocal claimed
            now = self._store.clock()
            claimed = None
            job = read(name, replies[0])
            if job is None or job.state != "queued":
                return [("ZREM", self._keys.jobs("queued"), name)]
            if job.record_version > VERSION:
                return [("ZADD", self._keys.jobs("queued"), now + _NOT_OURS, name)]
            if job.expires <= now:
                return self._store.changes.move(job, "failed", now, now, {"error": pack_error(_expired(job))})
            claimed = job
            fields = {"lease": token, "started": now, "attempts": job.attempts + 1}
            return [
                *self._store.changes.move(job, "running", now + self.seconds, now, fields),
                ("HMGET", self._keys.job(name), "header", "payload", "seal"),
            ]

        replies = await self._store.change(name, decide)
        if claimed is None or not replies:
            return None
        return Claim(claimed, token, Packed(*[value or b"" for value in replies[-1]]))

    async def renew(self, tokens: Mapping[str, str]) -> list[str]:
        """Keep the leases of these jobs by their tokens; returns those that are lost."""
        until = self._store.clock() + self.seconds
        names = list(tokens)
        with typed():
            records = await asyncio.gather(
                *[self._client.call("HMGET", self._keys.job(name), "state", "lease") for name in names]
            )
            kept = [
                name
                for name, record in zip(names, records, strict=True)
                if record == [b"running", tokens[name].encode()]
            ]
            if kept:
                scores = [word for name in kept for word in (until, name)]
                await self._client.call("ZADD", self._keys.jobs("running"), "XX", *scores)
        return [name for name in names if name not in kept]

    async def finish(self, claim: Claim, state: State, fields: Mapping[str, Any]) -> bool:
        """End the job with what its run gave; False when the lease was lost. Repeating it is safe."""
        return await self._leave(claim, state, 0.0, fields)

    async def postpone(self, claim: Claim, delay: float, error: errors.GatewayError | None) -> bool:
        """Queue the job again, to be run in `delay` seconds at the earliest. As `finish`."""
        return await self._leave(claim, "queued", delay, {"error": pack_error(error)} if error else {})

    async def _leave(self, claim: Claim, state: State, delay: float, fields: Mapping[str, Any]) -> bool:
        held = False

        def decide(replies: list[Any]) -> list[Command]:
            nonlocal held
            job = read(claim.job.id, replies[0])
            held = job is not None and job.lease == claim.token
            # With the token there and the job not running, the change was made before and its reply lost.
            if job is None or not held or job.state != "running":
                return []
            now = self._store.clock()
            return self._store.changes.move(job, state, now + delay, now, fields)

        await self._store.change(claim.job.id, decide)
        return held

    async def recover(self) -> list[tuple[str, State]]:
        """Queue the jobs again whose lease ran out, or bury those that did so too often; returns what became of each."""
        with typed():
            ids = await self._client.call(
                "ZRANGEBYSCORE", self._keys.jobs("running"), "-inf", self._store.clock(), "LIMIT", 0, 100
            )
        return [(name, state) for each in ids if (state := await self._recover(name := each.decode())) is not None]

    async def _recover(self, name: str) -> State | None:
        became: State | None = None

        def decide(replies: list[Any]) -> Sequence[Command]:
            nonlocal became
            became = None
            job, score = read(name, replies[0]), replies[1]
            now = self._store.clock()
            if job is None or job.state != "running":
                return [("ZREM", self._keys.jobs("running"), name)]
            if score is None or float(score) > now:
                return []  # renewed since it was found
            crashes = job.crashes + 1
            if crashes < CRASHES:
                became = "queued"
                return self._store.changes.move(job, "queued", now, now, {"crashes": crashes, "lease": ""})
            became = "dead"
            fields = {"crashes": crashes, "lease": "", "error": pack_error(_deadly(crashes))}
            return self._store.changes.move(job, "dead", now, now, fields)

        await self._store.change(name, decide, [("ZSCORE", self._keys.jobs("running"), name)])
        return became

    async def prune(self) -> None:
        """Take jobs out of the indexes whose records are past their time to live."""
        now = self._store.clock()
        kept: dict[State, float] = {
            state: self._store.changes.kept(state) for state in ("done", "failed", "cancelled", "dead")
        }
        with typed():
            await asyncio.gather(
                *[
                    self._client.call("ZREMRANGEBYSCORE", self._keys.jobs(state), "-inf", now - seconds)
                    for state, seconds in kept.items()
                ]
            )


def _expired(job: Job) -> errors.DeadlineExceeded:
    last = job.error
    why = f"; the last attempt ended with: {last.message}" if last else ""
    return errors.DeadlineExceeded(f"the job could not be run before it expired{why}")


def _deadly(crashes: int) -> errors.Internal:
    return errors.Internal(
        f"the gateway that ran the job was lost {crashes} times while it did; the request may be what ends it. "
        "`gateway jobs requeue` runs it again"
    )
