"""What became of every request of a run, and whether the gateway kept its promises.

    python -m loadtest.history client-1.jsonl client-2.jsonl

A history is a file with one JSON object a line: first the run (`Run`), then one line for each request when it is over, and one for
each answer that nobody had asked for (`Record`). A request carries a tag of its own, which a right answer brings back, so a lost, a
doubled and a swapped answer are all to be seen. `check` needs no more than the lines, whoever wrote them.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from loadtest.overload_client import ANSWERED, EXPIRED, SHED, kind_of

GRACE_SECONDS = 0.1  # after its deadline, in which an accepted request may still be answered

LOST, UNANSWERED, UNSENT = 0, -1, -2  # instead of an HTTP status


class Run(msgspec.Struct, frozen=True):
    """What one client set out to do. Its requests have the numbers from 0 to `requests` - 1."""

    client: str
    requests: int = -1  # -1: until it is told to stop, and then as many as there are lines
    deadline_ms: float = 0.0  # 0: none


class Record(msgspec.Struct, frozen=True):
    """One request; times are seconds of CLOCK_MONOTONIC, which all processes of a host share.

    `status` is HTTP's, or LOST (the connection broke first), UNANSWERED (nothing came, long after the deadline) or UNSENT
    (no connection was to be had). `answer` is the tag that came back. `id` is -1 for an answer without a request.
    """

    id: int
    tag: int
    sent: float
    received: float | None
    status: int
    answer: int | None = None
    attempts: int = 1
    port: int = 0
    error: str = ""  # the text of an answer other than 200


@dataclass(frozen=True, slots=True)
class History:
    """One client's run and its records."""

    run: Run
    records: list[Record]


@dataclass(slots=True)
class Verdict:
    """What `check` found; requests are `<client>:<id>`."""

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # status and text of answers other than 200, numbers left out
    missing: list[str] = field(default_factory=list)  # no line, or one that says that no answer came
    lost: list[str] = field(default_factory=list)  # the connection broke, as it must where a gateway is killed
    unsent: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # another request's answer, or none that can be read
    overdue: list[str] = field(default_factory=list)  # answered, with whatever, after the deadline and the grace
    accepted: int = 0  # answered, shed or expired: all that was not refused on arrival
    late: int = 0  # accepted, and then answered after the deadline, or with the news that it has passed
    slowest: float = 0.0  # seconds from sent to received, of those answered with 200
    gap: float = 0.0  # the longest time without an answer of 200 between the first of them and the last

    @property
    def late_share(self) -> float:
        """Of the accepted requests, how many were late."""
        return self.late / max(self.accepted, 1)

    def faults(self, *, lost: int = 0, late_share: float = 1.0) -> list[str]:
        """What must not happen and did, a line each. So many connections may have broken, such a share may be late."""
        found = {
            "never answered": self.missing,
            "answered twice": self.twice,
            "given another's answer": self.wrong,
            "answered too late": self.overdue,
            "never sent": self.unsent,
            "lost with their connection": self.lost if len(self.lost) > lost else [],
        }
        lines = [f"{len(ids)} {what}: {', '.join(ids[:5])}" for what, ids in found.items() if ids]
        if self.late_share > late_share:
            lines.append(f"{self.late_share:.3%} of the accepted were late, at most {late_share:.3%} may be")
        return lines

    def __str__(self) -> str:
        statuses = ", ".join(f"{_WORDS.get(status, status)} {count}" for status, count in sorted(self.statuses.items()))
        late = f"late {self.late} of {self.accepted} accepted ({self.late_share:.3%})"
        times = f"slowest {1e3 * self.slowest:.1f} ms, longest time without an answer {1e3 * self.gap:.1f} ms"
        texts = [f"{count} x {text}" for text, count in self.errors.most_common(10)]
        return "\n".join([f"{self.requests} requests: {statuses}", f"{late}, {times}", *texts, *self.faults()])


_WORDS = {LOST: "lost", UNANSWERED: "unanswered", UNSENT: "unsent"}
_NUMBER = re.compile(r"\d+(\.\d+)?")


def check(histories: Iterable[History], grace: float = GRACE_SECONDS) -> Verdict:
    """Judge all clients' histories together."""
    verdict = Verdict()
    good: list[float] = []
    for history in histories:
        _count(history, verdict)
        lines: Counter[int] = Counter()
        right: dict[int | None, int] = {
            record.tag: record.id for record in history.records if record.answer == record.tag
        }
        for record in history.records:
            if record.id < 0 or (record.answer != record.tag and record.answer in right):
                # An answer to nobody, or to somebody who had one: the wrong one has got the other's second.
                verdict.twice.append(_name(history, right.get(record.answer, -1)))
            if record.id < 0:
                continue
            lines[record.id] += 1
            _judge(history, record, verdict, grace)
            if record.status == 200 and record.received is not None:
                good.append(record.received)
        verdict.twice += [_name(history, number) for number, count in lines.items() if count > 1]
    verdict.gap = max((after - before for before, after in pairwise(sorted(good))), default=0.0)
    return verdict


def _count(history: History, verdict: Verdict) -> None:
    """Find the requests that left no line at all."""
    seen = {record.id for record in history.records if record.id >= 0}
    planned = history.run.requests if history.run.requests >= 0 else max(seen, default=-1) + 1
    verdict.requests += max(planned, len(seen))
    verdict.missing += [_name(history, number) for number in range(planned) if number not in seen]


def _judge(history: History, record: Record, verdict: Verdict, grace: float) -> None:
    name = _name(history, record.id)
    verdict.statuses[record.status] += 1
    silent = {LOST: verdict.lost, UNANSWERED: verdict.missing, UNSENT: verdict.unsent}.get(record.status)
    if silent is not None or record.received is None:
        (verdict.missing if silent is None else silent).append(name)
        return
    if record.status == 200 and record.answer != record.tag:
        verdict.wrong.append(name)
    if record.status != 200:
        verdict.errors[f"{record.status} {_NUMBER.sub('#', record.error)}".rstrip()] += 1
    _judge_time(history.run.deadline_ms / 1e3 or math.inf, record, verdict)
    if record.received - record.sent > (history.run.deadline_ms / 1e3 or math.inf) + grace:
        verdict.overdue.append(name)


def _judge_time(deadline: float, record: Record, verdict: Verdict) -> None:
    kind = kind_of(record.status, record.error.encode(), b"")
    if kind not in (ANSWERED, SHED, EXPIRED):
        return
    took = (record.received or 0.0) - record.sent
    verdict.accepted += 1
    verdict.late += kind == EXPIRED or (kind == ANSWERED and took > deadline)
    if kind == ANSWERED:
        verdict.slowest = max(verdict.slowest, took)


def _name(history: History, number: int) -> str:
    return f"{history.run.client}:{'?' if number < 0 else number}"


class Writer:
    """Writes a history; a context manager. What was written is on disk when it is left, or when `flush` returns."""

    def __init__(self, path: Path, run: Run) -> None:
        self._file = path.open("wb", buffering=1 << 16)
        self._encode = msgspec.json.Encoder().encode
        self._write(run)

    def add(self, record: Record) -> None:
        """One request is over."""
        self._write(record)

    def flush(self) -> None:
        """Let readers see all of it."""
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, line: Run | Record) -> None:
        self._file.write(self._encode(line) + b"\n")


def read(path: Path) -> History:
    """A history as its client left it; a line that its death cut short is left out."""
    lines = path.read_bytes().split(b"\n")
    if not lines[0]:
        return History(Run(path.stem), [])
    decode = msgspec.json.Decoder(Record).decode
    return History(msgspec.json.decode(lines[0], type=Run), [decode(line) for line in lines[1:-1]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict on the files named; 1 when there is a fault."""
    verdict = check([read(Path(path)) for path in (sys.argv[1:] if arguments is None else arguments)])
    print(verdict)
    return 1 if verdict.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
