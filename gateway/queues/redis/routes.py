"""The gateway's end of sequences: which worker has begun one, and the order of its requests on their way there.

A hash in Redis knows of each sequence the token of its last beginning, and of that token the worker which took it. A
beginning goes to the lane that all workers read, what follows to the stream of that worker alone. Requests of a sequence
are sent one after the other, in the order they came; those that come before any worker has begun it wait here. One that
was not answered ends its sequence, so that nothing goes on over a gap, and none is ever sent twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from redis.exceptions import RedisError

from gateway import errors
from gateway import sequence as refusals
from gateway.config.model import ModelConfig
from gateway.queues.base import Lane
from gateway.queues.redis.directory import Directory
from gateway.queues.redis.link import Link
from gateway.redis_client import Disconnected, unheeded
from gateway.sequence import SequenceId, flag, id_of
from gateway.types import InferRequest

LATEST = b"s"
"""The field that has the token of the last beginning, and after it the gateway that sent it."""
_TOKEN = 16  # bytes
_GRACE = 15.0  # seconds that a sequence is known after it was idle for too long: its worker is the one to say so
_LIVES = 600.0  # seconds that what was sent to one worker is kept: it may never have it removed
_CLAIMED = 1.0  # seconds that a claim may come later than the answer: in a cluster the two go to different servers
_ENDED, _LOST = b"!e", b"!l"  # in place of a worker
_BROKEN = b"!b"  # so it is for those that wait behind a request which nobody waits for any more


def life(idle: float) -> int:
    """Milliseconds that a sequence is known after its last request."""
    return int((idle + _GRACE) * 1000)


@dataclass(slots=True, eq=False)
class Part:
    """A request's place in its sequence. `token` and `owner` are known once it was sent: to whom, or to all.

    `shared` is the stream that all workers read, `after` the call before it that was sent and not answered.
    """

    id: SequenceId
    key: str
    life: int
    start: bool
    end: bool
    shared: str
    token: bytes = b""
    owner: str = ""
    after: bytes = b""


class Call(Protocol):
    """What is seen of a call that is part of a sequence."""

    id: bytes
    lane: Lane
    part: Part | None
    stream: str
    answered: bool
    sending: bool
    missing: bool
    done: bool

    def fail(self, error: errors.GatewayError) -> bool:
        """See `Job.fail`."""


class Sender(Protocol):
    """All calls of this process."""

    def send(self, call: Any) -> asyncio.Task[None] | None:
        """Put a call into its stream, at once or at the end of the task."""

    def __contains__(self, call: object) -> bool:
        """Whether its caller waits for the call of this id."""


@dataclass(slots=True)
class _Line:
    """The calls of one sequence that are yet to be sent."""

    calls: deque[Call] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, frozen=True)
class _Note:
    """What Redis is to know of a sequence, and did not hear, as long as that matters."""

    part: Part
    command: str
    fields: tuple[bytes, ...]
    until: float
    heard: asyncio.Future[None]

    def settle(self) -> None:
        """It was heard, or refused, or matters no more."""
        if not self.heard.done():
            self.heard.set_result(None)


@dataclass(slots=True)
class _Known:
    """What Redis knows of a sequence: nothing, that it is about to begin, who has it, or how it ended."""

    token: bytes = b""
    gateway: str = ""
    owner: bytes = b""
    old: tuple[bytes, ...] = ()  # tokens
    heard: asyncio.Future[None] | None = None  # done once Redis knows it too

    @classmethod
    def read(cls, found: list[bytes]) -> _Known:
        """Of the fields of the hash."""
        fields = dict(zip(found[::2], found[1::2], strict=True))
        latest = fields.pop(LATEST, b"")
        token = latest[:_TOKEN]
        return cls(token, latest[_TOKEN:].decode(errors="replace"), fields.pop(token, b""), tuple(fields))

    @property
    def worker(self) -> str:
        """Who has it."""
        return "" if self.owner.startswith(b"!") else self.owner.decode(errors="replace")


class Routes:
    """The sequences of one gateway process."""

    def __init__(self, link: Link, calls: Sender) -> None:
        self.directory: Directory  # set before anything is sent
        self._link = link
        self._calls = calls
        self._lines: dict[str, _Line] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lately: dict[bytes, tuple[float, Part]] = {}  # beginnings that were answered, and when
        self._unnoted: dict[str, list[_Note]] = {}  # by key, in their order
        self._latest: dict[str, tuple[bytes, bytes]] = {}  # by key: the call that was sent last, behind its token

    def part_of(self, lane: Lane, request: InferRequest, shared: str) -> Part | None:
        """None for what is of no sequence. Raises `InvalidArgument` for parameters of a wrong kind."""
        if "sequence_id" not in request.parameters:
            return None
        config = self._config(lane)
        if config is None or config.sequences is None or not (id_ := id_of(request)):
            return None  # or a worker refuses it
        key = self._link.client.keys.sequence(lane.model, lane.version, id_)
        start, end = flag(request, "sequence_start"), flag(request, "sequence_end")
        return Part(id_, key, life(config.sequences.idle_us / 1e6), start, end, shared)

    def enter(self, call: Call, part: Part, *, again: bool = False) -> None:
        """Send a call in its turn, which is before all others if it was sent before."""
        line = self._lines.get(part.key)
        if line is None:
            line = self._lines[part.key] = _Line()
            task = self._link.start(self._run(part.key, line), "sequence")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if again:
            line.calls.appendleft(call)
            line.changed.set()
        else:
            line.calls.append(call)

    def left(self, call: Call, part: Part) -> None:
        """Its caller has seen the last of a call."""
        self._tidy(part.key)
        if part.token and (part.end or not call.answered):
            self._note(part, part.token, _ENDED)
        elif part.token == call.id and not part.owner:
            self._lately[call.id] = time.monotonic(), part
        if (line := self._lines.get(part.key)) is not None:
            line.changed.set()

    def stored(self, part: Part) -> None:
        """A call is in its stream, or could not be put there."""
        if (line := self._lines.get(part.key)) is not None:
            line.changed.set()

    def lose(self, call: Call, part: Part) -> None:
        """It may have run, and nobody will answer it: its sequence is over."""
        if part.token:  # else the caller is about to hear of it
            self.refuse(call, part, refusals.lost(part.id, call.lane.model), _LOST)

    def refuse(self, call: Call, part: Part, error: errors.GatewayError, how: bytes = _ENDED) -> None:
        """A call that was to be sent ends its sequence. First all gateways are to know; then the caller may ask any."""
        self._note(part, part.token, how).add_done_callback(lambda _: call.fail(error))
        part.token = b""

    def begin_again(self, call: Call, part: Part) -> None:
        """Its worker is dead, and nothing has gone on from it: it may begin at another, unless its sequence has ended."""
        part.token, part.owner = b"", ""
        self.enter(call, part, again=True)

    def orphaned(self, part: Part) -> bool:
        """Whether the worker is dead that the call was sent to."""
        directory = self.directory
        return bool(part.owner) and (
            directory.is_dead(part.owner) or (not directory.is_alive(part.owner) and directory.sure)
        )

    def refresh(self, part: Part) -> None:
        """A call waits for long: its sequence is to be known for as long."""
        if part.token:
            self._link.client.call("PEXPIRE", part.key, part.life).add_done_callback(unheeded)

    def look(self) -> None:
        """To be called now and then: look again what those wait for that could not be sent, and what nobody has claimed."""
        for line in self._lines.values():
            line.changed.set()
        for key in list(self._unnoted):
            self._note_again(key)
        now = time.monotonic()
        while self._lately and now - (first := next(iter(self._lately.values())))[0] >= _CLAIMED:
            token = next(iter(self._lately))
            del self._lately[token]
            self._note(first[1], token, _LOST, command="HSETNX")  # else other gateways would wait for it

    def close(self) -> None:
        """Send no more."""
        for task in self._tasks:
            task.cancel()

    # --- within

    async def _run(self, key: str, line: _Line) -> None:
        try:
            while line.calls:
                line.changed.clear()
                try:
                    await asyncio.gather(*self._note_again(key))
                    known = _Known.read(await self._link.client.call("HGETALL", key))
                    sent = await self._forward(line, known)
                except Disconnected:
                    await self._link.client.online()
                except RedisError as problem:
                    self._refuse(line, problem)
                else:
                    if not sent:
                        await line.changed.wait()
        finally:
            del self._lines[key]
            self._tidy(key)

    def _tidy(self, key: str) -> None:
        """Forget what was sent last once its caller has gone, and nothing may go on by what was known before that."""
        if key in self._latest and key not in self._lines and self._latest[key][1] not in self._calls:
            del self._latest[key]

    async def _forward(self, line: _Line, known: _Known) -> bool:
        """Send what can be sent; false when the rest has to wait for a worker to begin the sequence."""
        while line.calls:
            call = line.calls[0]
            part = call.part
            assert part is not None
            again = known.token == call.id  # see `begin_again`
            owner = known.owner if known.worker and not again and self._keeps(known.worker, call.lane) else b""
            stored = True
            if call.done:  # nobody waits for it, and nothing goes on after the gap
                if known.token:
                    known.owner, known.heard = _BROKEN, self._note(part, known.token, _ENDED)
            elif known.token and not known.owner and not again and self._begins(known):
                return False
            elif owner or (part.start and not (again and known.owner.startswith(b"!"))):
                if part.start:
                    known = self._begin(call, part, known, owner)
                stored = await self._pass(call, part, known, line)
            else:
                self._turn_away(call, part, known)
            line.calls.remove(call)  # which another may precede by now
            if not stored:
                break  # the sequence may have ended with it
        return True

    def _begin(self, call: Call, part: Part, known: _Known, owner: bytes) -> _Known:
        """A sequence begins with this call, at the worker that has it already, or at whichever takes the call."""
        client = self._link.client
        old = (*known.old, known.token) if known.token else known.old
        if old:
            client.call("HDEL", part.key, *old).add_done_callback(unheeded)
        self._note(part, LATEST, call.id + self._link.process.encode(), *((call.id, owner) if owner else ()))
        return _Known(call.id, self._link.process, owner)

    async def _pass(self, call: Call, part: Part, known: _Known, line: _Line) -> bool:
        """Send a call and wait until it is in its stream: what goes on from it must not be there without it."""
        part.token, part.owner = known.token, known.worker
        # Redis may lose the one before yet and keep this one: the worker is to see that something is missing.
        token, latest = self._latest.get(part.key, (b"", b""))
        part.after = latest if token == part.token and not part.start else b""
        self._latest[part.key] = part.token, call.id
        if part.owner:
            self.refresh(part)
        call.stream = self._link.client.keys.owned(*call.lane, part.owner) if part.owner else part.shared
        try:
            sending = self._calls.send(call)
        except errors.GatewayError as problem:  # it cannot be written
            self.refuse(call, part, problem)
            return False
        if sending is not None:
            await sending
        if part.owner:  # who may be gone, and then nobody else removes the stream
            self._link.client.call("PEXPIRE", call.stream, int(_LIVES * 1000)).add_done_callback(unheeded)
        while part.token and not call.done and (call.sending or call.missing):
            line.changed.clear()
            await line.changed.wait()
        return bool(part.token) and not call.done

    def _note(self, part: Part, *fields: bytes, command: str = "HSET") -> asyncio.Future[None]:
        """Tell Redis, again and again while it is away; done once all gateways can know."""
        self._note_again(part.key)  # what is older must not come later: it may say that the sequence goes on
        heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._write(_Note(part, command, fields, time.monotonic() + part.life / 1000, heard))
        return heard

    def _note_again(self, key: str) -> list[asyncio.Future[int]]:
        now = time.monotonic()
        notes = self._unnoted.pop(key, ())
        for note in notes:
            if now >= note.until:
                note.settle()
        return [self._write(note) for note in notes if now < note.until]

    def _write(self, note: _Note) -> asyncio.Future[int]:
        client, part = self._link.client, note.part
        noted = client.call(note.command, part.key, *note.fields)
        noted.add_done_callback(partial(self._noted, note))
        client.call("PEXPIRE", part.key, part.life).add_done_callback(unheeded)
        return noted

    def _noted(self, note: _Note, noted: asyncio.Future[int]) -> None:
        problem = asyncio.CancelledError() if noted.cancelled() else noted.exception()
        if problem is not None:
            self._unnoted.setdefault(note.part.key, []).append(note)
        if problem is None or isinstance(problem, RedisError):
            note.settle()

    def _refuse(self, line: _Line, problem: RedisError) -> None:
        self._link.report("sequence_unknown", reason=str(problem))
        while line.calls:
            line.calls.popleft().fail(
                errors.Unavailable("the queue's Redis does not say which worker has the sequence")
            )

    def _turn_away(self, call: Call, part: Part, known: _Known) -> None:
        """Refuse what cannot be sent. Nor does anything go on after it, when the directory knows the worker again."""
        error = self._refusal(call, part, known)
        if known.token and not known.owner.startswith(b"!"):
            known.owner, known.heard = _LOST, self._note(part, known.token, _LOST)
        if known.heard is None:
            call.fail(error)
        else:  # as in `refuse`: first all gateways are to know
            known.heard.add_done_callback(lambda _: call.fail(error))

    def _refusal(self, call: Call, part: Part, known: _Known) -> errors.GatewayError:
        model = call.lane.model
        if known.owner == _BROKEN:
            return refusals.broken(part.id, model)
        if part.start or (known.token and known.owner != _ENDED):
            return refusals.lost(part.id, model)
        return refusals.not_started(part.id, model)

    def _begins(self, known: _Known) -> bool:
        """Whether the beginning that nobody has taken yet may still be taken."""
        if known.gateway == self._link.process:
            return known.token in self._calls or known.token in self._lately
        return self.directory.is_alive(known.gateway) or not self.directory.sure

    def _keeps(self, worker: str, lane: Lane) -> bool:
        """Whether a worker goes on with what it has begun."""
        directory = self.directory
        if worker == self._link.process:
            pool = None if directory.leaving else directory.pool(lane.model)
            return pool is not None and any(
                state.version == lane.version and state.state == "READY" for state in pool.versions
            )
        member = directory.members.get(worker)
        return member.serves(lane) if member is not None else not directory.sure and not directory.is_dead(worker)

    def _config(self, lane: Lane) -> ModelConfig | None:
        pool = self.directory.pool(lane.model)
        versions = () if pool is None else pool.versions
        return next((state.config for state in versions if state.version == lane.version), None)
