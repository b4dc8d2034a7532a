"""How many workers the load needs: what an autoscaler is told."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping

UTILISATION = 0.8  # of what the workers can do; the rest is for bursts and for a worker that dies
_DRAIN = 30.0  # seconds in which what waits is to be worked off
_WINDOW = 60.0  # seconds over which arrivals are averaged
_SHORT = 5.0  # seconds below which two looks tell no rate


def desired(arrivals: float | None, backlog: float, workers: int, rows_per_second: float) -> float:
    """The workers that a version keeps busy for `UTILISATION` of their time, as a fraction to be rounded up.

        (arrivals + backlog / 30 s) / (0.8 * rows_per_second / workers)

    `arrivals` are rows per second, None while unknown, and `backlog` rows that wait; `rows_per_second` is what the live
    `workers` answer together in batches of their best size, 0 while that is not learned. Models on the same
    workers need the sum. What is not known changes nothing: the answer is then the workers that are there, and
    one where there are none and somebody asks.
    """
    load = (arrivals or 0.0) + backlog / _DRAIN
    if not workers:
        return 1.0 if load else 0.0
    if rows_per_second <= 0:
        return float(workers)
    needed = load * workers / (UTILISATION * rows_per_second)
    return max(needed, float(workers)) if arrivals is None else needed


class Demand:
    """Rows per second that are asked for, from counters looked at now and then. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, Mapping[Hashable, float]]] = deque()

    def look(self, asked: Mapping[Hashable, float], now: float) -> Mapping[Hashable, float] | None:
        """The rates over about the last minute of those for which `asked` rows have come so far.

        None until there were two looks some seconds apart. A counter that has fallen began anew.
        """
        while len(self._looks) > 1 and now - self._looks[1][0] >= _WINDOW:
            self._looks.popleft()
        rates: dict[Hashable, float] | None = None
        if self._looks and now - self._looks[0][0] >= _SHORT:
            then, before = self._looks[0]
            seen = {key: before.get(key, 0.0) for key in asked}
            rates = {
                key: (rows - seen[key] if rows >= seen[key] else rows) / (now - then) for key, rows in asked.items()
            }
        if not self._looks or now - self._looks[-1][0] >= _SHORT:
            self._looks.append((now, dict(asked)))
        return rates
