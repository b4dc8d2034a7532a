"""What is known of one link: whether it is used, how long its runs take, how many rows fit into its memory.

Pure: the caller gives the time, in monotonic seconds. A link is out of use by a word of REASONS, until a probe has shown
that it works again; between probes the pause doubles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

REASONS = {
    "load": "it does not load",
    "unavailable": "it cannot be reached, or says that it cannot run",
    "crash": "its process crashed again and again",
    "memory": "it is out of memory, even for the smallest part of a batch",
    "error": "it fails where the next one does not",
    "deadline": "it would answer too late, where the next one would not",
    "busy": "it takes no more now",
}
"""Why a link did not answer, in one word and in more."""

_FIRST = 0.25  # seconds until the first probe
_STEADY = 10.0  # seconds of good service after which trouble is new trouble
_DOUBT = 4.0  # seconds between probes of a link that is only slow, at most
_ENOUGH = 3  # failures in a row that are no accident
_SMOOTH = 0.3  # the weight of the latest run
_PATIENCE = 32  # good runs before more rows are tried,
_MOST_PATIENCE = 4096  # at most, however often that was too much


class Health:
    """Whether a link is used, and when to try one again that is not."""

    def __init__(self, longest: float) -> None:
        """`longest` is the longest pause between probes."""
        self.trouble = ""  # why it is out of use, a word of REASONS
        self.text = ""  # the same in the words of its error
        self.retry_at = math.inf
        self._longest = longest
        self._pause = _FIRST
        self._recovered_at = -math.inf
        self._crashed: list[
            dict[int, object]
        ] = []  # the requests of each batch, kept because what is gone lends its identity
        self._failures = 0

    def ran(self) -> None:
        """A run succeeded: what failed before was an accident."""
        if self._failures or self._crashed:
            self._failures = 0
            self._crashed.clear()

    def failed(self) -> bool:
        """A run failed that the next link could do. True when that was often enough, without a good run in between."""
        self._failures += 1
        return self._failures >= _ENOUGH

    def crashed(self, batch: Sequence[object]) -> bool:
        """A batch of these requests crashed the engine. True when it is the engine that is to blame.

        Parts of a batch that crashed are tried again, and crash again for the same request: they count once. Batches
        that have no request in common are evidence against the engine.
        """
        requests = {id(request): request for request in batch}
        for place, known in enumerate(self._crashed):
            if known.keys() & requests.keys() or not requests:
                self._crashed[place] = requests
                return False
        self._crashed.append(requests)
        if len(self._crashed) < _ENOUGH:
            return False
        self._crashed.clear()
        return True

    def trip(self, reason: str, text: str, now: float, retry_after: float = 0.0) -> None:
        """Take the link out of use."""
        self._pause = self._next_pause(now)
        self.trouble, self.text = reason, text
        self.retry_at = now + min(max(self._pause, retry_after), self._longest)

    def doubt(self, now: float) -> None:
        """Have it probed though it is in use."""
        self._pause = self._next_pause(now)
        self.retry_at = now + min(self._pause, _DOUBT)

    def _next_pause(self, now: float) -> float:
        soon = now - self._recovered_at < _STEADY
        return min(2 * self._pause, self._longest) if soon else _FIRST

    def mended(self, now: float) -> None:
        """What was wrong is put right, by all that is known: probe it at once."""
        if self.trouble:
            self.retry_at = now

    def refused(self, reason: str, text: str, now: float) -> None:
        """A probe failed."""
        if self.trouble:
            self._pause = min(2 * self._pause, self._longest)
        self.trouble, self.text = reason, text
        self.retry_at = now + self._pause

    def recovered(self, now: float) -> None:
        """A probe succeeded: the link is in use."""
        self.trouble = self.text = ""
        self.retry_at = math.inf
        self._recovered_at = now
        self.ran()


class Times:
    """How many seconds runs take, by the power of two that their rows come to."""

    def __init__(self) -> None:
        self._known: dict[int, float] = {}

    def learn(self, rows: int, seconds: float) -> None:
        """A run took so long."""
        size = max(rows - 1, 0).bit_length()
        before = self._known.get(size)
        self._known[size] = seconds if before is None else before + _SMOOTH * (seconds - before)

    def exceeded(self, rows: int, seconds: float) -> None:
        """A run was given up after so long. A single one is an accident, several in a row are not."""
        self.learn(rows, 1.5 * seconds)

    def forget(self) -> None:
        """What was known holds no more."""
        self._known.clear()

    def at_least(self, rows: int) -> float | None:
        """The expected seconds, of a size that has not run those of fewer rows; None when none of these has."""
        size = max(rows - 1, 0).bit_length()
        found = max((known for known in self._known if known <= size), default=None)
        return None if found is None else self._known[found]

    def predict(self, rows: int) -> float | None:
        """The expected seconds, on the safe side for a size that has not run; None when none has."""
        size = max(rows - 1, 0).bit_length()
        if size in self._known:
            return self._known[size]
        larger = [seconds for known, seconds in self._known.items() if known > size]
        if larger:
            return min(larger)
        smaller = max(self._known, default=None)
        return None if smaller is None else self._known[smaller] * 2 ** (size - smaller)


class Room:
    """How many rows fit into the memory of a link, once a run has failed for want of it."""

    def __init__(self) -> None:
        self.rows = 0  # the most to run at once; 0 while nothing has failed
        self._failed = 0  # rows of the smallest batch that did not fit
        self._good = 0
        self._grew = False
        self._patience = _PATIENCE

    def holds(self, rows: int) -> bool:
        """Whether so many rows may be run at once."""
        return not self.rows or rows <= self.rows

    def refuse(self, rows: int) -> int:
        """So many rows did not fit; returns how many to try."""
        if self._grew:  # too early
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self._failed, self._good, self._grew = rows, 0, False
        self.rows = max(1, rows // 2)
        return self.rows

    def fitted(self, rows: int) -> None:
        """So many rows did fit. After many runs as large as may be, twice as many are tried."""
        if not self.rows or 2 * rows <= self.rows:
            return
        self._good += 1
        if self._good >= self._patience:
            self._good, self._grew = 0, True
            self.rows *= 2
            if self.rows > self._failed:
                self.rows = 0
