"""Whether a server is worth a request now, and how long an answer may take before one asks whether it is still there.

A server that breaks connections, refuses them or is silent is lost: nothing is sent to it but a trial now and then, one
at a time, and the first answer brings it back. A trial is a request like any other, so nobody probes behind the
callers' backs. Pure state: who asks brings the time, in monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_SAMPLES = 32
_QUANTILE = 0.95
_PATIENCE = (0.25, 1.0)  # seconds, at least and at most; the most while nothing is known
_PATIENT = 4.0  # times the usual
_LEAST_OF_DEADLINE, _MOST_OF_DEADLINE = 0.25, 0.5  # that it may use up where another engine can do the rest
_SILENT = 3  # requests in a row that nothing came of
_FIRST_PAUSE, _LONGEST_PAUSE = 0.125, 1.0  # seconds between trials; doubled each time
_LONGEST_HOLD = 5.0  # seconds for which a server may ask to be left alone


@dataclass(slots=True)
class Attempt:
    """One request that was let through: how it ends must be told to `Health`, once."""

    started: float
    trial: bool = False


class Health:
    """What is known of one server."""

    def __init__(self) -> None:
        self.lost = False
        self.heard = 0.0  # when the last answer came, whatever it said
        self._latencies: deque[float] = deque(maxlen=_SAMPLES)
        self._doubted = False  # whether they were found too long for somebody, since the last of them
        self._failures = 0  # in a row
        self._silent = 0  # in a row
        self._changed = 0.0  # when it was last found lost or there
        self._hold_until = 0.0
        self._next_trial = 0.0
        self._trying = False

    @property
    def usual(self) -> float:
        """Seconds in which 95 % of the last answers came; 0 while nothing is known."""
        if not self._latencies:
            return 0.0
        return sorted(self._latencies)[int(_QUANTILE * (len(self._latencies) - 1) + 0.5)]

    @property
    def patience(self) -> float:
        """Seconds without any answer after which to ask whether it is there."""
        return min(max(_PATIENT * self.usual, _PATIENCE[0]), _PATIENCE[1]) if self._latencies else _PATIENCE[1]

    def spare(self, remaining: float) -> float:
        """Seconds to give it of those that remain when another engine stands by, 0 when it is too slow for that.

        Some times what is usual, so that those who wait behind are not kept by a server that does not answer.
        """
        most = _MOST_OF_DEADLINE * remaining
        if self.usual > most:
            self._doubted = True
            return 0.0
        return min(most, max(_PATIENT * self.usual, _LEAST_OF_DEADLINE * remaining))

    def admit(self, now: float) -> Attempt | None:
        """Let a request through, or None."""
        if now < self._hold_until or (self.lost and (self._trying or now < self._next_trial)):
            return None
        self._trying = self.lost
        return Attempt(now, self.lost)

    def again_in(self, now: float) -> float:
        """Seconds until a request may get through that does not now."""
        return max(self._hold_until - now, self._next_trial - now, _FIRST_PAUSE)

    def answered(self, attempt: Attempt, now: float) -> None:
        """It answered with a result."""
        if self._doubted:  # since nobody has asked it for a while, what was usual may have changed
            self._latencies.clear()
            self._doubted = False
        self._latencies.append(now - attempt.started)
        self.hear(now)
        self._end(attempt)

    def declined(self, attempt: Attempt, now: float, retry_after: float = 0.0) -> None:
        """It answered with an error, and perhaps asked to be left alone for some seconds."""
        self.hear(now)
        self._hold_until = max(self._hold_until, now + min(retry_after, _LONGEST_HOLD))
        self._end(attempt)

    def gave_up(self, attempt: Attempt, now: float) -> None:
        """No answer came in time. If that goes on, and nothing else comes either, nobody is there."""
        if self.heard < attempt.started:
            self._silent += 1
            if attempt.trial or self._silent >= _SILENT:
                self._failures = max(self._failures, 1)
                self._lose(attempt, now)
        self._end(attempt)

    def failed(self, attempt: Attempt, now: float) -> None:
        """The connection was refused or broke, or it said that it cannot serve."""
        self._lose(attempt, now)
        self._end(attempt)

    def abandoned(self, attempt: Attempt) -> None:
        """It was never sent."""
        self._end(attempt)

    def hear(self, now: float) -> None:
        """It is there."""
        self.heard = now
        self._failures = self._silent = 0
        if self.lost:
            self.lost, self._changed, self._next_trial = False, now, 0.0
            self._latencies.clear()

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
