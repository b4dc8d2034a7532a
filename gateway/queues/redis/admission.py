"""Whether the fleet can answer a request in time: what a gateway knows of workers that it shares with other gateways.

A fluid estimate of `SCHEDULING.md` section 2: what waits ahead of the request, at the rate of all live workers, and one
batch of its own. Each worker's own scheduler decides on what it was given with all it knows; this keeps what
cannot be answered in time from being given to them.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.queues.base import Capacity, Lane
from gateway.types import InferRequest

_PASSAGE = 0.004  # seconds that a request and its answer spend in Redis and on the way


class FleetAdmission:
    """The `Admission` of one lane on a gateway. Rows are counted from `admit` to `settle`."""

    asks_all = True

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._max_queue = 0
        self._capacities: Sequence[Capacity] = ()
        self._rate = 0.0  # rows a second of all workers
        self._elsewhere = 0  # rows that other gateways wait for
        self._requests = 0
        self._rows = 0
        self._tenants: Counter[str] = Counter()  # rows of each

    def configure(self, config: ModelConfig) -> None:
        """The model's own limit on its queue, which each gateway keeps for itself."""
        self._max_queue = 0 if config.batching is None else config.batching.queue_policy.max_queue_size

    def weigh(self, capacities: Sequence[Capacity], elsewhere: int) -> None:
        """What the live workers can do, and the rows that other gateways wait for."""
        known = [capacity for capacity in capacities if capacity.per_row > 0]
        self._capacities = known
        self._rate = sum(each.places * each.rows / each.seconds(each.rows) for each in known)
        self._elsewhere = elsewhere

    def admit(self, request: InferRequest) -> None:
        """See `Admission.admit`."""
        if self._max_queue and self._requests >= self._max_queue:
            raise errors.queue_full(request.id, None)
        if request.deadline is not None and (refusal := self._refuse(request.deadline, request.rows, request.tenant)):
            raise refusal
        self._requests += 1
        self._rows += request.rows
        self._tenants[request.tenant] += request.rows

    def turn_away(self, deadline: float) -> float | None:
        """See `Admission.turn_away`."""
        refusal = self._refuse(deadline, 1, None)
        return (
            None if refusal is None else refusal.retry_after
        )  # without one it is no overload: it is read, and told so

    def turned_away(self, times: int) -> None:
        """See `Admission.turned_away`."""

    def settle(self, request: InferRequest) -> None:
        """See `Admission.settle`."""
        self._requests -= 1
        self._rows -= request.rows
        self._tenants[request.tenant] -= request.rows
        if not self._tenants[request.tenant]:
            del self._tenants[request.tenant]

    def capacity(self) -> Capacity | None:
        """See `Admission.capacity`: a gateway has none of its own."""
        return None

    def explain(self, seconds: float) -> Mapping[str, Any]:
        """See `Admission.explain`."""
        refusal = self._refuse(time.monotonic() + seconds, 1, None) if seconds else None
        return {
            "fleet": {
                "places": sum(each.places for each in self._capacities),
                "rows_per_second": round(self._rate, 1),
                "rows_waiting_here": self._rows,
                "rows_waiting_elsewhere": self._elsewhere,
            },
            "next": {
                "deadline_ms": round(seconds * 1e3, 3) if seconds else None,
                "answered_in_ms": round(self._answered_in(1, None) * 1e3, 4),
                "refused": None if refusal is None else refusal.reason,
                "text": "" if refusal is None else refusal.message,
            },
        }

    def _refuse(self, deadline: float, rows: int, tenant: str | None) -> errors.GatewayError | None:
        if not self._rate:
            return None  # nothing is known of its speed: the workers decide
        left = deadline - time.monotonic()
        alone = min(each.seconds(rows) for each in self._capacities)
        if alone > left:
            return errors.DeadlineTooShort(
                f"not even an idle worker can answer in {left * 1e3:.0f} ms; a run takes {alone * 1e3:.0f} ms. "
                "Give the request more time"
            )
        if not self._rows + self._elsewhere:
            return None
        needed = self._answered_in(rows, tenant)
        if needed <= left:
            return None
        return errors.Overloaded(
            f"it would be answered in {needed * 1e3:.0f} ms and has {left * 1e3:.0f} ms; try again later, or give it "
            "more time",
            (needed - left) * (1 + random.random() / 2),
        )

    def _answered_in(self, rows: int, tenant: str | None) -> float:
        """Seconds until a request of so many rows is answered that comes now."""
        if not self._rate:
            return 0.0
        ahead = self._elsewhere + self._ahead(tenant)
        batch = min(each.seconds(min(each.rows, max(rows, ahead + rows))) * each.tail for each in self._capacities)
        return ahead / self._rate + batch + _PASSAGE

    def _ahead(self, tenant: str | None) -> int:
        """Rows of this gateway that count against a tenant: its own, and of each other as many at most."""
        if tenant is None or len(self._tenants) < 2:
            return self._rows
        own = self._tenants.get(tenant, 0)
        return own + sum(min(rows, max(own, 1)) for name, rows in self._tenants.items() if name != tenant)
