"""A worker's answers on their way out: first the answer, once that is stored the acknowledgement.

Everything answered within a turn of the event loop goes out together: one entry for each gateway, and one
acknowledgement for each stream. A worker that dies in between leaves the request to be run again, never unanswered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from redis.exceptions import RedisError

from gateway import errors
from gateway.message import pack_error
from gateway.queues.redis import wire
from gateway.queues.redis.beside import INLINE
from gateway.queues.redis.link import Link
from gateway.redis_client import Disconnected, unheeded
from gateway.redis_client.keys import GROUP
from gateway.telemetry import log_event
from gateway.types import Buffer

_KEPT = 10_000  # entries in a reply stream; a gateway reads them at once, or is gone
_LARGE_LIVES = 120.0  # seconds that the tensors of a large answer wait for a gateway to fetch them
_UNSENT_LIVES = 60.0  # seconds that answers are kept which Redis did not take


class Answered(Protocol):
    """What the outbox knows of a job: where it came from, and whom to answer."""

    call: bytes
    reply_to: str
    stream: str
    entry: bytes


@dataclass(slots=True)
class _Mail:
    """What goes to one process in one entry, and the jobs that are over once it is stored."""

    fields: list[bytes] = field(default_factory=list)
    ends: list[Answered] = field(default_factory=list)
    until: float = 0.0


class Outbox:
    """Sends answers and acknowledgements of one process."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._mail: dict[str, _Mail] = defaultdict(_Mail)
        self._unsent: list[tuple[str, _Mail]] = []
        self._acks: dict[str, list[bytes]] = defaultdict(list)
        self._scheduled = False
        self._open = 0
        self._idle = asyncio.Event()
        self.unacknowledged: dict[str, set[bytes]] = defaultdict(set)
        """Entries by stream that are done with, and still pending in Redis."""
        self.on_acknowledged: list[Callable[[], None]] = []
        self.on_lost: list[Callable[[Answered], None]] = []
        """Told of jobs whose answer nobody will hear of, and which are still pending."""

    def answer(self, job: Answered, kind: bytes, header: bytes, parts: Sequence[Buffer] = (), *, final: bool) -> None:
        """Send one answer; the job's entry is acknowledged when its last one is stored."""
        if final:
            self.unacknowledged[job.stream].add(job.entry)
        if sum(map(len, parts)) > INLINE:
            self._begin()
            self._link.start(self._send_large(job, header, parts, final=final), "payload")
        else:
            self._put(job.reply_to, job.call, kind, header, parts, job if final else None)

    def tell(self, process: str, call: bytes, kind: bytes, header: bytes) -> None:
        """Answer another process's command or question."""
        self._put(process, call, kind, header, (self._link.process.encode(),))

    def done(self, job: Answered) -> None:
        """Acknowledge a job that nobody waits for."""
        self.unacknowledged[job.stream].add(job.entry)
        self._acks[job.stream].append(job.entry)
        self._schedule()

    def retry(self) -> None:
        """Send again what Redis did not take, as long as somebody may wait for it."""
        unsent, self._unsent = self._unsent, []
        now = time.monotonic()
        for process, mail in unsent:
            if now < mail.until:
                self._send(process, mail)
            else:
                self._give_up(mail)
        if not self._open and not self._scheduled:  # else an answer of one of them may not be stored yet
            for stream, entries in self.unacknowledged.items():
                if entries:
                    self._acknowledge(stream, list(entries))

    async def flushed(self) -> None:
        """Wait until everything has been sent, or could not be."""
        while self._open or self._scheduled:
            self._idle.clear()
            await self._idle.wait()

    async def _send_large(self, job: Answered, header: bytes, parts: Sequence[Buffer], *, final: bool) -> None:
        payloads = self._link.payloads
        try:
            reference = await payloads.put(
                f"{job.call.hex()}-answer", parts, same_host=self._link.same_host(job.reply_to), ttl=_LARGE_LIVES
            )
            self._put(job.reply_to, job.call, wire.ELSEWHERE, header, [reference.encode()], job if final else None)
        except Disconnected:
            self._lose(job)
        except (errors.GatewayError, RedisError) as problem:
            self._link.report("answer_not_stored", logging.WARNING, reason=str(problem))
            lost = errors.Unavailable("the answer is too large for what the queue's Redis has room for now")
            self._put(job.reply_to, job.call, wire.ERROR, pack_error(lost), (), job)
        finally:
            self._end()

    def _put(  # noqa: PLR0917
        self,
        process: str,
        call: bytes,
        kind: bytes,
        header: bytes,
        parts: Sequence[Buffer],
        ends: Answered | None = None,
    ) -> None:
        mail = self._mail[process]
        # Redis allows equal fields in an entry, clients' dictionaries do not.
        name = call + len(mail.fields).to_bytes(4, "big")
        mail.fields += (name, wire.frame(kind, header, parts, self._link.seal, call))
        if ends is not None:
            mail.ends.append(ends)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        mail, self._mail = self._mail, defaultdict(_Mail)
        acks, self._acks = self._acks, defaultdict(list)
        for process, each in mail.items():
            each.until = time.monotonic() + _UNSENT_LIVES
            self._send(process, each)
        for stream, entries in acks.items():
            self._acknowledge(stream, entries)
        self._wake()

    def _send(self, process: str, mail: _Mail) -> None:
        client = self._link.client
        # Without NOMKSTREAM the stream of a gateway that is gone would be made again, and stay for ever.
        sent = client.call("XADD", client.keys.replies(process), "NOMKSTREAM", "MAXLEN", "~", _KEPT, "*", *mail.fields)
        self._begin()
        sent.add_done_callback(lambda sent: self._sent(sent, process, mail))

    def _sent(self, sent: asyncio.Future[bytes | None], process: str, mail: _Mail) -> None:
        if sent.cancelled() or sent.exception() is not None:
            self._unsent.append((process, mail))
        else:
            if sent.result() is None:
                self._link.counts.orphans += len(mail.ends)
            for job in mail.ends:
                self._acks[job.stream].append(job.entry)
            if mail.ends:
                self._schedule()
        self._end()

    def _give_up(self, mail: _Mail) -> None:
        for job in mail.ends:
            self._lose(job)
        log_event("answers_lost", logging.ERROR, answers=len(mail.fields) // 2)

    def _lose(self, job: Answered) -> None:
        # Its entry stays pending, and is run again should anybody still wait for it, unless it is one of a sequence.
        self.unacknowledged[job.stream].discard(job.entry)
        for told in self.on_lost:
            told(job)

    def _acknowledge(self, stream: str, entries: list[bytes]) -> None:
        client = self._link.client
        acknowledged = client.call("XACK", stream, GROUP, *entries)
        deleted = client.call("XDEL", stream, *entries)
        deleted.add_done_callback(unheeded)  # XACK's failure says it all
        self._begin()
        acknowledged.add_done_callback(lambda done: self._acknowledged(done, stream, entries))

    def _acknowledged(self, done: asyncio.Future[int], stream: str, entries: list[bytes]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.unacknowledged[stream].difference_update(entries)
            for told in self.on_acknowledged:
                told()
        self._end()

    def _begin(self) -> None:
        self._open += 1

    def _end(self) -> None:
        self._open -= 1
        self._wake()

    def _wake(self) -> None:
        if not self._open and not self._scheduled:
            self._idle.set()
