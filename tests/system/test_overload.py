"""The overload test's parts on a real gateway, short: what is refused is refused properly, and nothing is lost or doubled."""

from __future__ import annotations

import sys

from loadtest.overload_cells import Spec, fake_gateway, measure
from loadtest.overload_client import ANSWERED, OVERLOAD
from loadtest.overload_figures import PUBLISHED

# At the published pace the retries of 1200 requests/s can be more than a small host does for anything else.
SLOW = PUBLISHED.slower(4)


def test_half_more_than_the_capacity_with_retries_is_answered_or_refused_and_counted_once() -> None:
    with fake_gateway((sys.executable, "-m", "gateway"), SLOW) as fake:
        cell = measure(fake, Spec("storm", 1.5, warm=1.0, seconds=2.0, retries=True, pace=SLOW), seed=1)
    real = cell.real
    assert real.attempts > real.offered  # the refused asked again
    assert real.kinds[OVERLOAD] > 0
    assert real.without_retry_after == 0
    assert (real.broken, cell.strays) == (0, 0)
    assert cell.disagreements == {}
    # A gateway that queues instead, or serves small batches, answers next to nothing in time.
    assert real.kinds[ANSWERED] > 0.3 * SLOW.capacity * real.seconds
