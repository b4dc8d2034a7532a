"""The commands of one change of a job's state. Pure: given the job as it is, what is to be written.

Record, index, event and time to live change together, so an index never has a job twice and no change goes untold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.jobs.guarded import Command
from gateway.jobs.record import FINAL, Job, State
from gateway.redis_client import Keys

DEAD_SECONDS = 7 * 86_400.0  # an operator may be away for a while
_GRACE = 86_400.0  # how long after its expiry a record is kept that no gateway came to fail
_EVENTS = 10_000
_NEEDED_NO_MORE: dict[State, tuple[str, ...]] = {
    "done": ("header", "payload", "seal", "error"),
    "cancelled": ("header", "payload", "seal"),
}


class Changes:
    """Writes changes for the jobs of one fleet; `ttl` is how many seconds a finished job is kept."""

    def __init__(self, keys: Keys, ttl: float) -> None:
        self._keys = keys
        self._ttl = ttl

    def create(self, job: Job, now: float, fields: Mapping[str, Any]) -> list[Command]:
        """A new job is queued; `fields` are those of its record."""
        key = self._keys.job(job.id)
        return [
            ("HSET", key, *_flat({"state": "queued", **fields})),
            ("PEXPIREAT", key, _milliseconds(job.expires + _GRACE)),
            ("ZADD", self._keys.jobs("queued"), now, job.id),
            self._event(job, "queued", now),
        ]

    def move(self, job: Job, state: State, score: float, now: float, fields: Mapping[str, Any]) -> list[Command]:
        """The job changes its state. `score` in the new state's index: when it may run, when its lease or it ends."""
        key = self._keys.job(job.id)
        commands: list[Command] = [
            ("HSET", key, *_flat({"state": state, **fields})),
            ("ZREM", self._keys.jobs(job.state), job.id),
            ("ZADD", self._keys.jobs(state), score, job.id),
            self._event(job, state, now),
        ]
        if state in FINAL:
            commands += self._end(job, state, now)
        return commands

    def revive(self, job: Job, now: float, expires: float) -> list[Command]:
        """A job that failed or is dead is queued as if it were new."""
        fields = {"attempts": 0, "crashes": 0, "created": now, "expires": expires, "lease": ""}
        key = self._keys.job(job.id)
        return [
            *self.move(job, "queued", now, now, fields),
            ("HDEL", key, "error", "started", "finished", "hook", "hook_attempts"),
            ("PEXPIREAT", key, _milliseconds(expires + _GRACE)),
        ]

    def kept(self, state: State) -> float:
        """Seconds for which a job that ended in this state is kept."""
        return max(self._ttl, DEAD_SECONDS) if state == "dead" else self._ttl

    def _end(self, job: Job, state: State, now: float) -> list[Command]:
        key = self._keys.job(job.id)
        commands: list[Command] = [("HSET", key, "finished", now)]
        if gone := _NEEDED_NO_MORE.get(state):
            commands.append(("HDEL", key, *gone))
        commands.append(("PEXPIREAT", key, _milliseconds(now + self.kept(state))))
        if job.callback:
            commands += [
                ("HSET", key, "hook", "pending"),
                ("ZADD", self._keys.job_hooks(), now, job.id),
            ]
        return commands

    def _event(self, job: Job, state: State, now: float) -> Command:
        stream = self._keys.job_events()
        return ("XADD", stream, "MAXLEN", "~", _EVENTS, "*", "job", job.id, "state", state, "time", now)


def _flat(fields: Mapping[str, Any]) -> list[Any]:
    return [each for pair in fields.items() for each in pair]


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
