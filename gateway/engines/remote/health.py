"""Whether a server is worth a request now: is it there, and can it answer in time.

A server that breaks connections, refuses them or is silent is lost: nothing is sent to it but a trial now and then, one
at a time, and the first answer brings it back. One that is only slow is passed over by requests that cannot wait for
it, but for a trial now and then, so that it is noticed when it is quick again. A trial is a request like any other,
so nobody probes behind the callers' backs, and its caller loses no more than the time it gave.
Pure state: who asks brings the time, in monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_SAMPLES = 32  # of each size
_QUANTILE = 0.95
_SLOW_TRIAL = 0.5  # seconds between trials of a server that is slow
_FIRST_PAUSE, _LONGEST_PAUSE = 0.125, 1.0  # seconds between trials of one that is lost; doubled each time
_LONGEST_HOLD = 5.0  # seconds for which a server may ask to be left alone


class Latency:
    """How long answers take, lately, by the size of the request: its rows, rounded to a power of two."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}

    def predicted(self, rows: int) -> float:
        """Seconds in which 95 % of answers came to requests of this size, or to the next smaller one known; 0: unknown."""
        size = max((each for each in self._samples if each <= rows.bit_length()), default=None)
        if size is None:
            return 0.0
        ordered = sorted(self._samples[size])
        return ordered[int(_QUANTILE * (len(ordered) - 1) + 0.5)]

    def add(self, rows: int, seconds: float) -> None:
        """An answer took so long, or at least so long when it was not waited for."""
        self._samples.setdefault(rows.bit_length(), deque(maxlen=_SAMPLES)).append(seconds)

    def restart(self) -> None:
        """What was known holds no more."""
        self._samples.clear()


@dataclass(slots=True)
class Attempt:
    """One request that was let through: how it ends must be told to `Health`, once."""

    rows: int
    started: float
    trial: bool = False


class Health:
    """What is known of one server."""

    def __init__(self) -> None:
        self.latency = Latency()
        self.lost = False
        self._failures = 0  # in a row
        self._changed = 0.0  # when it was last found lost or there
        self._heard = 0.0  # when the last answer came, whatever it said
        self._hold_until = 0.0
        self._next_trial = 0.0
        self._trying = False

    def admit(self, rows: int, now: float, until: float | None, queued: float = 0.0) -> Attempt | None:
        """Let a request through, or None. Who has `until` can do something better than wait longer.

        `queued` is the seconds it will wait here before it is sent.
        """
        if now < self._hold_until:
            return None
        slow = until is not None and now + queued + self.latency.predicted(rows) > until
        if not self.lost and not slow:
            return Attempt(rows, now)
        if self._trying or now < self._next_trial:
            return None
        self._trying = True
        if slow:
            self._next_trial = now + _SLOW_TRIAL
        return Attempt(rows, now, trial=True)

    def again_in(self, now: float) -> float:
        """Seconds until a request may get through that does not now."""
        return max(self._hold_until - now, self._next_trial - now, _FIRST_PAUSE)

    def answered(self, attempt: Attempt, now: float) -> None:
        """It answered with a result."""
        self._hear(attempt, now)
        if attempt.trial:
            self.latency.restart()
        self.latency.add(attempt.rows, now - attempt.started)

    def declined(self, attempt: Attempt, now: float, retry_after: float = 0.0) -> None:
        """It answered with an error, and perhaps asked to be left alone for some seconds."""
        self._hear(attempt, now)
        self._hold_until = max(self._hold_until, now + min(retry_after, _LONGEST_HOLD))

    def gave_up(self, attempt: Attempt, now: float) -> None:
        """The answer did not come in time. If nothing else came either, nobody is there."""
        self.latency.add(attempt.rows, now - attempt.started)
        if self._heard < attempt.started:
            self._lose(attempt, now)
        self._end(attempt)

    def failed(self, attempt: Attempt, now: float) -> None:
        """The connection was refused or broke, or it said that it cannot serve."""
        self._lose(attempt, now)
        self._end(attempt)

    def abandoned(self, attempt: Attempt) -> None:
        """Nobody waits for it any more, which says nothing about the server."""
        self._end(attempt)

    def _hear(self, attempt: Attempt, now: float) -> None:
        self._heard = now
        if self.lost:
            self.lost, self._changed, self._next_trial = False, now, 0.0
        self._failures = 0
        self._end(attempt)

    def _lose(self, attempt: Attempt, now: float) -> None:
        if attempt.started < self._changed:
            return  # it was on its way when another found out the same
        # One break may be an idle connection's that the server has closed: the next request may go at once.
        pause = _FIRST_PAUSE * 2 ** (self._failures - 1) if self._failures else 0.0
        self._next_trial = now + min(pause, _LONGEST_PAUSE)
        self.lost, self._changed = True, now
        self._failures += 1

    def _end(self, attempt: Attempt) -> None:
        if attempt.trial:
            self._trying = False
