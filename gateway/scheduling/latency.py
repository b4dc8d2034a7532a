"""What a batch of n rows takes: learned from every run, of one model on one kind of place and for one size of row.

Times are seconds. The model is a table of means per batch size, an affine fit for the sizes that were not run yet,
a level `g` common to all sizes that follows a device which slows down or recovers, and a tail ratio that turns the
mean into a bound. Reading it costs a table look-up. The scheme is `SCHEDULING.md` section 1; the affine shape of
l(n) is Nexus's (SOSP 2019), profiling each size instead of trusting the line is Clockwork's (OSDI 2020).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Mapping
from itertools import accumulate
from statistics import median

_NEWS = 0.2  # weight of the newest sample of a size
_SURE = 3  # samples of a size from which its own mean is used instead of the fit
_CLIP = 2.0  # a sample counts as at most this many means
_DRIFT = 0.1  # how much of one batch's error goes into the level
_SHIFT = 1.5  # three errors in a row beyond this factor, all one way: the device is another one now
_WINDOW = 64  # ratios the tail is taken from
_WORST_TAIL = 4.0
_WRONG, _RIGHT = 0.5, 0.25  # mean relative error above which predictions are wrong, and below which right again
_PATIENCE = 20  # batches
_ENOUGH = 0.97  # of the best rows per second
_YOUNG = 16  # batches before which a size must be known by itself to judge by
_PRIOR = 0.01  # weight of a persisted fit against one measured size


class LatencyModel:
    """Predicts the duration of a batch from its rows. Until something was observed it predicts 0 and bounds nothing."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.largest = 0  # rows of the largest batch seen
        self.trusted = True
        self.error = 0.0  # EWMA of |actual / predicted - 1|
        self.batches = 0
        self._wrong_for = 0
        self._means: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        # Sums of the fit with weights 1 / seconds squared, over sizes: w, w n, w n n, w seconds, w n seconds.
        self._w = self._wn = self._wnn = self._wy = self._wny = 0.0
        self._a = self._b = 0.0
        self._gauged = False  # more than one size is known
        self._g = 1.0
        self._tail = 1.0
        self._ratios: deque[float] = deque(maxlen=_WINDOW)
        self._sorted: list[float] = []
        self._surprises: list[tuple[int, float, float]] = []  # rows, ratio, seconds of the last runs, all odd one way
        self._table: list[float] = [0.0]  # mean of n rows at level 1, monotone, for every n that may be run
        self._efficient = max_rows

    # --- reading

    @property
    def known(self) -> bool:
        """Whether there is anything to predict from."""
        return self._b > 0

    @property
    def cap(self) -> int:
        """Rows of the largest batch worth trying: sizes are explored by doubling."""
        return min(self.max_rows, 2 * self.largest) if self.largest else self.max_rows

    @property
    def tail(self) -> float:
        """The 95th percentile of actual to predicted over the last runs, between 1 and 4."""
        return self._tail

    @property
    def fit(self) -> tuple[float, float]:
        """Seconds per batch and seconds per row, at today's level."""
        return self._a * self._g, self._b * self._g

    @property
    def efficient(self) -> int:
        """Rows of the smallest batch that gives nearly the best rows per second."""
        return self._efficient

    @property
    def longest(self) -> float:
        """Expected seconds of the largest batch worth trying."""
        return self._table[-1] * self._g

    def mean(self, rows: int) -> float:
        """Expected seconds of a batch."""
        table = self._table
        return (table[rows] if rows < len(table) else max(table[-1], self._a + self._b * rows)) * self._g

    def bound(self, rows: int) -> float:
        """Seconds that 19 of 20 such batches keep to."""
        return self.mean(rows) * self._tail

    def rows(self, seconds: float) -> int:
        """Rows of the largest batch, among those that may be tried, expected to take no longer; 0 if none is."""
        return bisect_right(self._table, seconds / self._g) - 1

    def room(self, seconds: float) -> int:
        """Rows of the largest batch, among those that may be tried, whose bound is within `seconds`; 0 if none is."""
        if not self.known:
            return self.max_rows
        return bisect_right(self._table, seconds / (self._g * self._tail) * (1 + 1e-9)) - 1 if seconds > 0 else 0

    # --- learning

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from one run. What is no duration is ignored; so should be, by the caller, a run that failed."""
        if not (rows > 0 and 0 < seconds < math.inf):
            return
        self.batches += 1
        predicted = self.mean(rows)
        if predicted > 0 and self._judge(rows, seconds / predicted):
            self._be_surprised(rows, seconds / predicted, seconds)
        else:
            self._learn_late()
            self._learn(rows, seconds / self._g)
        if rows > self.largest:
            self.largest = rows
            self._tabulate()

    def measured(self, rows: int, seconds: float) -> None:
        """Take this for what a size takes, whatever was known of it, as if it had run often enough to be sure."""
        if not (rows > 0 and 0 < seconds < math.inf):
            return
        self.batches += _SURE
        seconds /= self._g
        self._weigh(rows, self._means.get(rows, math.inf), seconds)
        self._means[rows] = seconds
        self._counts[rows] = max(self._counts.get(rows, 0), _SURE)
        self.largest = max(self.largest, rows)
        self._solve()
        self._tabulate()

    def _judge(self, rows: int, ratio: float) -> bool:
        """Take the error of one prediction into the level, the tail and the trust. Returns whether it was odd."""
        self.error += (min(abs(ratio - 1), _WORST_TAIL) - self.error) * _DRIFT
        self._wrong_for = self._wrong_for + 1 if self.error > _WRONG else 0
        if self._wrong_for >= _PATIENCE:
            self.trusted = False
        elif self.error < _RIGHT:
            self.trusted = True
        if self._counts.get(rows, 0) < _SURE and (self.batches < _YOUNG or rows > self.largest):
            return False  # the fit may be wrong about a size it never saw; that says nothing of the device
        self._remember(ratio)
        if 1 / _SHIFT <= ratio <= _SHIFT:
            self._g *= ratio**_DRIFT
            return False
        return True

    def _be_surprised(self, rows: int, ratio: float, seconds: float) -> None:
        """Find out whether the device changed its speed. Then every size did, and the level follows at once."""
        if self._surprises and (self._surprises[-1][1] > 1) != (ratio > 1):
            self._learn_late()
        self._surprises.append((rows, ratio, seconds))
        if len(self._surprises) < 3:
            return
        if len({rows for rows, _, _ in self._surprises}) == 1 and not self._contradicts(rows, seconds):
            self._learn_late()  # it is this size that is not as the fit has it
            return
        self._g *= median(ratio for _, ratio, _ in self._surprises)
        # What led here was no tail of the device as it is now.
        for _ in self._surprises:
            del self._sorted[bisect_left(self._sorted, self._ratios.pop())]
        for size, _, taken in self._surprises:
            self._learn(size, taken / self._g)
        self._surprises.clear()

    def _contradicts(self, rows: int, seconds: float) -> bool:
        """Whether a run took another time than earlier ones of its own size, and not just another than the fit has it."""
        own = self._means.get(rows)
        return own is not None and not 1 / _SHIFT <= seconds / (own * self._g) <= _SHIFT

    def _learn_late(self) -> None:
        """The odd runs meant no change of speed. They teach what is hardly known; elsewhere they were outliers."""
        for rows, _, seconds in self._surprises:
            if self._counts.get(rows, 0) < _SURE:
                self._learn(rows, seconds / self._g)
        self._surprises.clear()

    def _remember(self, ratio: float) -> None:
        if len(self._ratios) == _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._ratios[0])]
        self._ratios.append(ratio)
        insort(self._sorted, ratio)
        rank = math.ceil(0.95 * len(self._sorted)) - 1
        self._tail = min(max(self._sorted[rank], 1.0), _WORST_TAIL)

    def _learn(self, rows: int, seconds: float) -> None:
        count = self._counts.get(rows, 0)
        old = self._means.get(rows, seconds)
        if count >= _SURE:
            seconds = min(seconds, _CLIP * old)
        new = old + (seconds - old) * max(_NEWS, 1 / (count + 1))
        self._weigh(rows, old if count else math.inf, new)
        self._means[rows] = new
        self._counts[rows] = count + 1
        self._solve()
        # The whole table is made anew while it is young; later one entry moves a little and the rest can wait.
        if count < _SURE or self.batches < _WINDOW or self.batches % 8 == 0:
            self._tabulate()

    def _weigh(self, rows: int, old: float, new: float, share: float = 1.0) -> None:
        """Let a size count in the fit with new seconds instead of old; errors relative to them are what is kept small."""
        weight = share * (1 / (new * new) - 1 / (old * old))
        weighted = share * (1 / new - 1 / old)
        self._w += weight
        self._wn += weight * rows
        self._wnn += weight * rows * rows
        self._wy += weighted
        self._wny += weighted * rows

    def _solve(self) -> None:
        w, wn, wnn, wy, wny = self._w, self._wn, self._wnn, self._wy, self._wny
        spread = w * wnn - wn * wn
        self._gauged = spread > 1e-9 * w * wnn
        if self._gauged:
            slope = (w * wny - wn * wy) / spread
            constant = (wy - slope * wn) / w
            if slope > 0 and constant >= 0:
                self._a, self._b = constant, slope
                return
            if slope <= 0:
                self._a, self._b = wy / w * 0.999, wy / w * 0.001
                return
        # One size only, or a line that would begin below zero: in proportion to the rows.
        self._a, self._b = 0.0, wny / wnn

    def _tabulate(self) -> None:
        means, counts = self._means, self._counts
        values = [self._a + self._b * rows for rows in range(self.cap + 1)]
        values[0] = 0.0
        for rows, count in counts.items():
            if count >= _SURE and rows < len(values):
                values[rows] = means[rows]
        self._table = list(accumulate(values, max))
        if not self._gauged:
            return  # one size says nothing of what larger ones gain
        best = max((rows / self._table[rows] for rows in range(1, len(values))), default=0.0)
        self._efficient = next(
            (rows for rows in range(1, len(values)) if rows >= _ENOUGH * best * self._table[rows]), self.max_rows
        )

    # --- persistence

    def to_prior(self) -> dict[str, float]:
        """What is worth keeping beyond this process; plain numbers."""
        a, b = self.fit
        return {"a": a, "b": b, "tail": self._tail, "largest": self.largest}

    @classmethod
    def from_prior(cls, max_rows: int, prior: Mapping[str, float]) -> LatencyModel:
        """A model that starts from what another one learned, as weak evidence: the first runs outweigh it.

        Raises KeyError or ValueError for what `to_prior` did not write.
        """
        model = cls(max_rows)
        a, b, largest = float(prior["a"]), float(prior["b"]), int(prior["largest"])
        if not (0 <= a < math.inf and 0 < b < math.inf and largest > 0):
            raise ValueError(f"no latency model: {dict(prior)}")
        for rows in {1, min(largest, max_rows)}:
            model._weigh(rows, math.inf, a + b * rows, _PRIOR)
        model._tail = min(max(float(prior["tail"]), 1.0), _WORST_TAIL)
        # Half, so that the size it knew is the first that doubling may try.
        model.largest = max(1, min(largest, max_rows) // 2)
        model._solve()
        model._tabulate()
        return model
