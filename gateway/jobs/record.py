"""One job's record: its states and the fields of its hash. Times are seconds since 1970 by Redis' clock.

A job is `queued`, then `running` under a lease, then one of: `done`, it has a result; `failed`, the model or its own
expiry refused it, with the error; `cancelled`, by its client; `dead`, a dead letter for the operator: what runs it died
too often, or it cannot be read. A job whose model is unavailable, or whose gateway stops or dies, is queued again.

| field                        | what                                                                                        |
|------------------------------|---------------------------------------------------------------------------------------------|
| `v`                          | version of the record; one that is newer than a gateway's own is left for newer gateways    |
| `state`                      | see above                                                                                   |
| `model`, `version`           | as asked for; an empty version is the newest when it runs                                   |
| `tenant`                     | whose it is, and who alone may see it                                                       |
| `header`, `payload`, `seal`  | the packed request (`gateway.message`) and its signature; gone once done or cancelled  |
| `size`                       | bytes of the payload                                                                        |
| `plan`                       | which outputs its client wants as binary; msgpack                                           |
| `digest`                     | of the idempotency key's body, when it came with one                                        |
| `created`, `expires`         | it is run until it expires, and then failed                                                 |
| `started`, `finished`        | of the last run; of the job                                                                 |
| `attempts`                   | runs that were begun                                                                        |
| `crashes`                    | runs whose gateway lost the lease                                                           |
| `lease`                      | token of the run that is under way, or was the last                                         |
| `error`                      | packed error: why it failed, or why it is still queued                                      |
| `result`, `output`, `sealed` | the packed response, its payload and its signature                                          |
| `callback`                   | URL to be told of the end                                                                   |
| `hook`, `hook_attempts`      | `pending`, `delivered`, or why it was given up; attempts to call it                         |
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from gateway import errors
from gateway.message import BadMessage, unpack_error
from gateway.telemetry import log_event

State: TypeAlias = Literal["queued", "running", "done", "failed", "cancelled", "dead"]
STATES: tuple[State, ...] = ("queued", "running", "done", "failed", "cancelled", "dead")
FINAL: frozenset[State] = frozenset(("done", "failed", "cancelled", "dead"))
VERSION = 1

_HEX = frozenset("0123456789abcdef")
_ID_LENGTH = 32

FIELDS = (
    "v", "state", "model", "version", "tenant", "size", "created", "expires", "started", "finished", "attempts",
    "crashes", "lease", "error", "callback", "hook", "hook_attempts", "digest",
)  # fmt: skip
"""The fields of a `Job`, in the order that `read` takes them."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is known of a job but its request and result. `position` is its place among the queued, from 1."""

    id: str
    state: State
    model: str
    version: str
    tenant: str
    size: int
    created: float
    expires: float
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    crashes: int = 0
    lease: str = ""
    packed_error: bytes = b""
    callback: str = ""
    hook: str = ""
    hook_attempts: int = 0
    digest: str = ""
    record_version: int = VERSION
    position: int | None = None

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL

    @property
    def error(self) -> errors.GatewayError | None:
        """Why it failed, or why it is queued again."""
        if not self.packed_error:
            return None
        try:
            return unpack_error(self.packed_error)
        except BadMessage as problem:
            return problem


def new_id() -> str:
    """An id that nobody can guess: 128 random bits."""
    return secrets.token_hex(_ID_LENGTH // 2)


def is_id(text: str) -> bool:
    """Whether this can be a job's id, and so part of a key."""
    return len(text) == _ID_LENGTH and _HEX.issuperset(text)


def read(job: str, values: Sequence[bytes | None], rank: int | None = None) -> Job | None:
    """A job from the values of `FIELDS`; None when there is no such record, or none that can be read.

    `rank` counts the queued before it.
    """
    found = {name: value.decode("utf-8", "replace") for name, value in zip(FIELDS, values, strict=True) if value}
    if found.get("state") not in STATES:
        return None
    try:
        return _read(job, found, values[FIELDS.index("error")] or b"", rank)
    except ValueError as problem:
        log_event("job_unreadable", logging.ERROR, job=job, reason=str(problem))
        return None


def _read(job: str, found: Mapping[str, str], error: bytes, rank: int | None) -> Job:
    return Job(
        id=job,
        state=cast("State", found["state"]),
        model=found.get("model", ""),
        version=found.get("version", ""),
        tenant=found.get("tenant", ""),
        size=int(found.get("size", 0)),
        created=float(found.get("created", 0)),
        expires=float(found.get("expires", 0)),
        started=_time(found.get("started")),
        finished=_time(found.get("finished")),
        attempts=int(found.get("attempts", 0)),
        crashes=int(found.get("crashes", 0)),
        lease=found.get("lease", ""),
        packed_error=error,
        callback=found.get("callback", ""),
        hook=found.get("hook", ""),
        hook_attempts=int(found.get("hook_attempts", 0)),
        digest=found.get("digest", ""),
        record_version=int(found.get("v", 0)),
        position=None if rank is None else rank + 1,
    )


def _time(text: str | None) -> float | None:
    return float(text) if text else None


def unknown(job: str) -> errors.NotFound:
    """No such job, or another tenant's, which is the same to who asks."""
    name = job if is_id(job) else f"{job[:40]!r}"
    return errors.NotFound(f"there is no job {name}: it was never submitted here, or its time to live is over")
