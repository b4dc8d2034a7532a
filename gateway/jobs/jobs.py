"""`Jobs`: what a transport needs of async inference: submit, look, fetch, watch, list, cancel. Tenants see their own only."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import msgspec

from gateway.errors import Cancelled, GatewayError, Internal, Unavailable
from gateway.jobs.base import HEARTBEAT, Change, Event, Plan, Result
from gateway.jobs.feed import Feed, after
from gateway.jobs.record import FINAL, Job, State, is_id, new_id, unknown
from gateway.jobs.store import JobStore, Packed
from gateway.jobs.webhook import WebhookPolicy
from gateway.message import pack_request, unpack_response
from gateway.queues.redis.seal import Seal
from gateway.types import InferRequest

_EXPIRES, _LONGEST = 86_400.0, 7 * 86_400.0  # seconds that a job has, unless its request says how many; and at most
_TRIES = 3
_LARGE = 1 << 20  # bytes from which packing is work for a thread


class Jobs:
    """The jobs of one fleet, for clients; an async context manager.

    `check` raises what a request would be refused with by its model, and reads its parameters.
    """

    def __init__(
        self,
        store: JobStore,
        check: Callable[[InferRequest], None],
        *,
        seal: Seal | None = None,
        webhooks: WebhookPolicy | None = None,
    ) -> None:
        self.store = store
        self.feed = Feed(store.client)
        self.seal = seal or Seal(None)
        self.webhooks = webhooks or WebhookPolicy(())
        self._check = check

    async def __aenter__(self) -> Self:
        await self.feed.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.close()
        await self.feed.__aexit__(kind, error, trace)

    def end_watches(self) -> None:
        """End the watches under way, for a stop: their clients connect again elsewhere."""
        self.feed.close()

    async def submit(self, request: InferRequest, plan: Plan | None = None, callback: str = "") -> Job:
        """Queue a request as a job, to be run until its deadline or, without one, for a day.

        `callback` is a URL to tell of the end. A repeat under the same idempotency key gets the first's job.
        """
        key = request.idempotency_key
        self._check(request)
        if callback:
            self.webhooks.check(callback)
        now = self.store.clock()
        left = _EXPIRES if request.deadline is None else min(max(request.deadline - time.monotonic(), 0.0), _LONGEST)
        # It is the job that expires, and not each attempt to run it.
        request.parameters = {name: value for name, value in request.parameters.items() if name != "timeout"}
        identity = new_id()
        large = request.size > _LARGE
        packed = await asyncio.to_thread(self._packed, identity, request) if large else self._packed(identity, request)
        digest = hashlib.sha256(packed.header + packed.payload).hexdigest() if key else ""
        job = Job(
            identity, "queued", request.model_name, request.model_version, request.tenant, len(packed.payload), now,
            now + left, callback=callback, digest=digest,
        )  # fmt: skip
        return await self._add(job, packed, msgspec.msgpack.encode(plan or Plan()), _digest(request) if key else "")

    def _packed(self, identity: str, request: InferRequest) -> Packed:
        header, parts = pack_request(request)
        payload = b"".join(parts)
        return Packed(header, payload, self.seal.sign(identity.encode(), header, payload))

    async def _add(self, job: Job, packed: Packed, plan: bytes, key: str) -> Job:
        """A reply that is lost says nothing of whether the job is there, so it is asked for again, under the same id."""
        for tries in range(_TRIES):
            try:
                return (await self.store.get(await self.store.add(job, packed, plan, key))).job
            except Unavailable:
                if tries == _TRIES - 1 or not self.store.client.connected:
                    raise
        raise AssertionError

    async def get(self, job: str, tenant: str) -> Job:
        """A job of this tenant. Raises NotFound."""
        if not is_id(job):
            raise unknown(job)
        found = (await self.store.get(job)).job
        if found.tenant != tenant:
            raise unknown(job)
        return found

    async def result(self, job: Job) -> Result | GatewayError | None:
        """What a job ended with; None while it has not ended."""
        if job.state == "done":
            packed, plan = await self.store.result(job.id)
            self.seal.verify(packed.seal, job.id.encode(), packed.header, packed.payload)
            return Result(unpack_response(packed.header, packed.payload), msgspec.msgpack.decode(plan, type=Plan))
        if job.state == "cancelled":
            return Cancelled(f"job {job.id} was cancelled")
        if job.final:
            return job.error or Internal(f"job {job.id} is {job.state}")
        return None

    async def cancel(self, job: str, tenant: str) -> Job:
        """Cancel a job of this tenant unless it has ended; it is returned as it then is. Raises NotFound."""
        if not is_id(job):
            raise unknown(job)
        return await self.store.cancel(job, tenant)

    async def list(self, tenant: str, states: Sequence[State], limit: int) -> Sequence[Job]:
        """This tenant's newest jobs in these states."""
        return await self.store.newest(states, limit, tenant)

    async def watch(self, job: str, tenant: str, heartbeat: float = HEARTBEAT) -> AsyncGenerator[Change, None]:
        """The job as it is now, then each change as it happens, until it has ended or the gateway stops.

        In between, a heartbeat whenever nothing happened for so many seconds. Raises NotFound before the first.
        """
        if not is_id(job):
            raise unknown(job)
        with self.feed.subscribe(job) as inbox:
            found, last = await self._snapshot(job, tenant)
            state: str = found.state
            yield Change(found, Event(last, job, state, _since(found)))
            while state not in FINAL:
                event = await inbox.next(heartbeat)
                if event is None and inbox.closed:
                    return
                if event is not None and not after(event.id, last):
                    continue
                if event is None:
                    with suppress(Unavailable):  # then the next look will tell
                        found, event = await self._missed(found, tenant, state)
                elif event.state in FINAL:
                    found, _ = await self._snapshot(job, tenant)
                if event is not None:
                    last, state = event.id, event.state
                yield Change(found, event)

    async def _missed(self, found: Job, tenant: str, state: str) -> tuple[Job, Event | None]:
        """The job as its record has it, and the event that did not come if that is another state."""
        found, newest = await self._snapshot(found.id, tenant)
        return found, None if found.state == state else Event(newest, found.id, found.state, _since(found))

    async def _snapshot(self, job: str, tenant: str) -> tuple[Job, bytes]:
        found, last = await self.store.get(job)
        if found.tenant != tenant:
            raise unknown(job)
        return found, last


def _since(job: Job) -> float:
    return job.finished or job.started or job.created


def _digest(request: InferRequest) -> str:
    names = (request.tenant, request.model_name, request.model_version, request.idempotency_key)
    return hashlib.sha256(b"\0".join(name.encode(errors="surrogatepass") for name in names)).hexdigest()
