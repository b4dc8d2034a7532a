"""`JobStore`: what clients and operators do with jobs, as commands to Redis. Keys: `redis_client`; fields: `record`.

Raises `GatewayError` only. After a lost connection it is not known whether a change happened; each may be asked for
again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from gateway.errors import InvalidArgument, ResourceExhausted, key_reused
from gateway.jobs.changes import Changes
from gateway.jobs.guarded import Command, Guarded, typed
from gateway.jobs.record import FIELDS, STATES, Job, State, read, unknown
from gateway.redis_client import RedisClient

_PAGE = 200  # records asked for at once
_LARGEST = (512 << 20) - 1024  # bytes of a value in Redis


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """`ttl` seconds that a finished job is kept; `max_jobs` that are kept at once, finished ones included."""

    ttl: float = 3600.0
    max_jobs: int = 10_000


class Packed(NamedTuple):
    """A packed request or response and its seal."""

    header: bytes
    payload: bytes
    seal: bytes


class Snapshot(NamedTuple):
    """A job, and the id of the newest event of any job when it was so."""

    job: Job
    event: bytes


class JobStore:
    """The jobs of one fleet. Used inside the client's context; `close` it before that ends."""

    def __init__(self, client: RedisClient, options: StoreOptions | None = None) -> None:
        self.client = client
        self.keys = client.keys
        self.options = options or StoreOptions()
        self.changes = Changes(self.keys, self.options.ttl)
        self.guarded = Guarded(client)

    def clock(self) -> float:
        """The time by the clock of the Redis that has the jobs."""
        return self.client.clock(self.keys.job_events())

    def close(self) -> None:
        """Drop the connections of its own."""
        self.guarded.close()

    async def add(self, job: Job, request: Packed, plan: bytes, key: str = "") -> str:
        """Queue a job and return its id; another job's, if that was submitted under the same idempotency key.

        `key` is a digest of the idempotency key and `job.digest` one of what it came with. Repeating this is safe.
        Raises ResourceExhausted when too many jobs are kept, Conflict for the key with another request.
        """
        check_size(len(request.payload), "request")
        watched = self.keys.job_key(key) if key else self.keys.job(job.id)
        reads: list[Command] = [("GET", watched)] if key else [("HGET", watched, "state")]
        reads += [("ZCARD", self.keys.jobs(state)) for state in STATES]
        fields = {
            **_fields(job),
            "header": request.header,
            "payload": request.payload,
            "seal": request.seal,
            "plan": plan,
        }
        before = job.id

        def decide(replies: list[Any]) -> list[Command]:
            nonlocal before
            there, *counts = replies
            if there is not None:
                before = _same(there.decode(), job.digest) if key else job.id
                return []
            if sum(counts) >= self.options.max_jobs:
                raise ResourceExhausted(
                    f"{self.options.max_jobs} jobs are kept already; fetch results sooner, or raise --max-jobs or lower "
                    "--job-ttl-secs",
                    5.0,
                )
            commands = self.changes.create(job, job.created, fields)
            if key:
                lives = int((job.expires - job.created + self.options.ttl) * 1000)
                commands.append(("SET", watched, f"{job.id} {job.digest}", "PX", lives))
            return commands

        await self.guarded.change(watched, reads, decide)
        return before

    async def get(self, job: str) -> Snapshot:
        """A job as it is. Raises NotFound."""
        with typed():
            values, rank, newest = await self.client.atomic(
                ("HMGET", self.keys.job(job), *FIELDS),
                ("ZRANK", self.keys.jobs("queued"), job),
                ("XREVRANGE", self.keys.job_events(), "+", "-", "COUNT", 1),
            )
        found = read(job, values, rank)
        if found is None:
            raise unknown(job)
        return Snapshot(found, newest[0][0] if newest else b"0-0")

    async def result(self, job: str) -> tuple[Packed, bytes]:
        """The packed response of a job that is done, and its plan."""
        with typed():
            *packed, plan = await self.client.call("HMGET", self.keys.job(job), "result", "output", "sealed", "plan")
        if packed[0] is None:
            raise unknown(job)
        return Packed(*[value or b"" for value in packed]), plan or b""

    async def request(self, job: str) -> Packed:
        """The packed request of a job that is not done."""
        with typed():
            packed = await self.client.call("HMGET", self.keys.job(job), "header", "payload", "seal")
        return Packed(*[value or b"" for value in packed])

    async def newest(self, states: Sequence[State], limit: int, tenant: str | None = None) -> list[Job]:
        """The newest `limit` jobs in these states, of one tenant or (None) of all."""
        found = [job for state in states async for job in self._newest(state, limit, tenant)]
        return sorted(found, key=lambda job: job.created, reverse=True)[:limit]

    async def _newest(self, state: State, limit: int, tenant: str | None) -> AsyncIterator[Job]:
        given = 0
        for start in count(0, _PAGE):
            with typed():
                ids = await self.client.call("ZREVRANGE", self.keys.jobs(state), start, start + _PAGE - 1)
                names = [each.decode() for each in ids]
                records = await asyncio.gather(
                    *[self.client.call("HMGET", self.keys.job(name), *FIELDS) for name in names]
                )
            for name, values in zip(names, records, strict=True):
                job = read(name, values)
                if job is not None and job.state == state and tenant in (None, job.tenant):
                    yield job
                    given += 1
                    if given == limit:
                        return
            if len(names) < _PAGE:
                return

    async def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with typed():
            counts = await asyncio.gather(*[self.client.call("ZCARD", self.keys.jobs(state)) for state in STATES])
        return dict(zip(STATES, counts, strict=True))

    async def cancel(self, job: str, tenant: str | None = None) -> Job:
        """Cancel a job unless it has ended, and return it as it then is. Raises NotFound, also for another tenant's."""
        found: Job | None = None

        def decide(replies: list[Any]) -> list[Command]:
            nonlocal found
            found = read(job, replies[0])
            if found is None or tenant not in (None, found.tenant):
                raise unknown(job)
            now = self.clock()
            return [] if found.final else self.changes.move(found, "cancelled", now, now, {})

        await self.change(job, decide)
        return (await self.get(job)).job

    async def requeue(self, job: str) -> Job:
        """Run a job again that failed or is dead, with as much time as it had at first. Raises NotFound, InvalidArgument."""

        def decide(replies: list[Any]) -> list[Command]:
            found = read(job, replies[0])
            if found is None:
                raise unknown(job)
            if found.state not in ("failed", "dead"):
                raise InvalidArgument(f"job {job} is {found.state}; only failed and dead jobs can be queued again")
            now = self.clock()
            return self.changes.revive(found, now, now + found.expires - found.created)

        await self.change(job, decide)
        return (await self.get(job)).job

    async def change(self, job: str, decide: Any, reads: Sequence[Command] = ()) -> list[Any] | None:
        """A guarded change of one record; `decide` is given the values of its `FIELDS` and the replies of `reads`."""
        key = self.keys.job(job)
        return await self.guarded.change(key, [("HMGET", key, *FIELDS), *reads], decide)


def check_size(size: int, what: str) -> None:
    """Raises InvalidArgument for a request or result that Redis cannot hold in one value."""
    if size > _LARGEST:
        raise InvalidArgument(
            f"the {what} of {size} bytes is more than the {_LARGEST} that a job can have; send fewer rows at a time"
        )


def _same(known: str, digest: str) -> str:
    job, _, before = known.partition(" ")
    if before != digest:
        raise key_reused()
    return job


def _fields(job: Job) -> Mapping[str, Any]:
    return {
        "v": job.record_version,
        "model": job.model,
        "version": job.version,
        "tenant": job.tenant,
        "size": job.size,
        "created": job.created,
        "expires": job.expires,
        "attempts": 0,
        "crashes": 0,
        "callback": job.callback,
        "digest": job.digest,
    }
