"""The servers of one remote model: which of them is asked, how long, and whether once more.

Promises that nobody waits longer than it may, that a server is sent no more than its limit, and that a request is
sent again only where it was not answered, within the retry budget and its time. Where no server is worth asking it
fails at once. All of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from gateway import errors
from gateway.engines.remote.budget import RetryBudget
from gateway.engines.remote.client import Client, Payload, Raw
from gateway.engines.remote.failures import Failure, unreachable
from gateway.engines.remote.health import Attempt, Health
from gateway.engines.remote.limit import Gate, GradientLimit
from gateway.telemetry import log_event


class Target:
    """One server."""

    def __init__(self, model: str, name: str, client: Client, most: int) -> None:
        """`name` is its `host:port`, `most` the requests that may be on their way to it."""
        self.name = name
        self.client = client
        self.health = Health()
        self.gate = Gate(GradientLimit(most))
        self._model = model
        self._asking: asyncio.Future[str | None] | None = None

    async def ask(self, attempt: Attempt, payload: Callable[[], Awaitable[Payload]], end: float) -> Raw:
        """Send what `payload` gives and wait for the answer until `end`. Raises `Failure`, and TimeoutError at the end."""
        ended: Callable[[Attempt], None] = self.health.abandoned
        try:
            if attempt.trial and self.health.lost:
                await self.client.renew()
            ready = await payload()
            ended = self._gave_up  # also when it is cancelled: whoever does that has somebody else answer
            async with asyncio.timeout(end - time.monotonic()), self.gate.enter():
                raw = await self._send(ready, end)
        except Failure as failure:
            ended = self._failed(failure)
            raise
        else:
            ended = self._answered
            return raw
        finally:
            ended(attempt)

    async def _send(self, payload: Payload, end: float) -> Raw:
        sent = time.monotonic()
        problem: BaseException | None = None
        async with asyncio.TaskGroup() as tasks:
            try:
                async with asyncio.timeout(None) as clock:
                    watching = tasks.create_task(self._watch(clock))
                    raw = await self.client.send(payload, end - sent)
            except (Failure, TimeoutError, asyncio.CancelledError) as raised:
                problem = (
                    raised  # and not out of the group, which would hold it in a ring of references with all its frames
                )
            watching.cancel()
        try:
            if isinstance(problem, TimeoutError) and not watching.cancelled():
                raise unreachable(self._model, watching.result())
            if problem is not None:
                raise problem
        finally:
            del problem, watching
        self.gate.limit.answered(time.monotonic() - sent, self.gate.open)
        return raw

    async def _watch(self, clock: asyncio.Timeout) -> str:
        """Ask whether the server is there when nothing has come from it for long. Ends the wait, and says why it is not."""
        since = time.monotonic()
        while True:
            quiet = time.monotonic() - max(self.health.heard, since)
            if quiet < (patience := self.health.patience):
                await asyncio.sleep(patience - quiet)
            elif (reason := await self._ask_whether_there()) is not None:
                clock.reschedule(asyncio.get_running_loop().time())
                return reason

    async def _ask_whether_there(self) -> str | None:
        """Why it is not; None if it is, or if that was not found out. One asks for all who wait."""
        if self._asking is not None:
            return await asyncio.shield(self._asking)
        self._asking = asyncio.get_running_loop().create_future()
        reason: str | None = None
        try:
            await self.client.live()
            self.health.hear(time.monotonic())
        except Failure as failure:
            reason = failure.reason
        finally:
            self._asking.set_result(reason)
            self._asking = None
        return reason

    def _answered(self, attempt: Attempt) -> None:
        self.health.answered(attempt, time.monotonic())

    def _gave_up(self, attempt: Attempt) -> None:
        self.gate.limit.dropped()
        self.health.gave_up(attempt, time.monotonic())

    def _failed(self, failure: Failure) -> Callable[[Attempt], None]:
        if failure.kind == "gone":
            return lambda attempt: self.health.failed(attempt, time.monotonic())
        if failure.kind == "busy":
            self.gate.limit.dropped()
        retry_after = failure.error.retry_after or 0.0
        return lambda attempt: self.health.declined(attempt, time.monotonic(), retry_after)


class Pool:
    """All of them, equals."""

    def __init__(self, model: str, targets: Sequence[Target]) -> None:
        """`model` is the name that clients and the log know."""
        self._model = model
        self._targets = list(targets)  # the next to ask first
        self._budget = RetryBudget()
        self._users: set[object] = set()

    async def ask(
        self, payload: Callable[[], Awaitable[Payload]], end: float, urgent: float | None = None
    ) -> tuple[Target, Raw]:
        """Ask one until `end`, and another if that fails, and return who answered, and what. Raises `GatewayError`.

        `urgent` is a deadline that another engine stands by to keep, and is to have the time for.
        """
        self._budget.sent(time.monotonic())
        error: errors.GatewayError | None = None
        try:
            for _ in range(len(self._targets) + 1):
                if error is not None and not self._budget.withdraw(time.monotonic()):
                    break
                if (picked := self._pick()) is None:
                    break
                target, attempt = picked
                try:
                    return target, await self._try(target, attempt, payload, self._until(target, attempt, end, urgent))
                except Failure as failure:
                    error = failure.error
                    if failure.kind == "declined":
                        break
            raise error or self._nobody()
        finally:
            del error  # or it would hold this frame, which holds it

    def join(self, user: object) -> None:
        """Somebody asks here from now on."""
        self._users.add(user)

    async def leave(self, user: object) -> None:
        """Somebody asks no more; the last one closes every connection. Idempotent."""
        self._users.discard(user)
        if not self._users:
            for target in self._targets:
                await target.client.close()

    async def _try(
        self, target: Target, attempt: Attempt, payload: Callable[[], Awaitable[Payload]], end: float
    ) -> Raw:
        lost = target.health.lost
        reason = ""
        try:
            return await target.ask(attempt, payload, end)
        except TimeoutError:
            reason = "it is silent"
            if target.health.lost:
                raise unreachable(self._model, reason) from None
            raise self._late(reason) from None
        except Failure as failure:
            reason = failure.reason
            if isinstance(failure.error, errors.Internal):
                log_event("remote_failed", logging.ERROR, model=self._model, server=target.name, reason=reason)
            raise
        finally:
            self._tell(target, lost, reason)

    def _until(self, target: Target, attempt: Attempt, end: float, urgent: float | None) -> float:
        """How long a server may be waited for. Raises `Failure` where that is no use."""
        now = time.monotonic()
        if urgent is not None:
            seconds = target.health.spare(urgent - now)
            if not seconds:
                target.health.abandoned(attempt)
                raise self._late("it is too slow")
            return now + seconds
        # With other servers to turn to, a trial may cost its caller half of its time and no more.
        turn = attempt.trial and any(not other.health.lost for other in self._targets if other is not target)
        return now + (end - now) / 2 if turn else end

    def _late(self, reason: str) -> Failure:
        late = errors.DeadlineExceeded(f"the remote server of model '{self._model}' does not answer in time")
        return Failure("declined", late, reason)

    def _tell(self, target: Target, before: bool, reason: str) -> None:
        if target.health.lost and not before:
            log_event("remote_lost", logging.WARNING, model=self._model, server=target.name, reason=reason)
        elif before and not target.health.lost:
            log_event("remote_back", model=self._model, server=target.name)

    def _pick(self) -> tuple[Target, Attempt] | None:
        """The server to ask: one that is due for a trial, or that with the fewest requests on their way, in turn."""
        now = time.monotonic()
        for target in sorted(
            self._targets, key=lambda each: (not each.health.lost, each.gate.open + each.gate.waiting)
        ):
            attempt = target.health.admit(now)
            if attempt is not None:
                self._targets.remove(target)
                self._targets.append(target)
                return target, attempt
        return None

    def _nobody(self) -> errors.Unavailable:
        again = min(target.health.again_in(time.monotonic()) for target in self._targets)
        return errors.Unavailable(
            f"the remote server of model '{self._model}' cannot be reached; try again later", again
        )
