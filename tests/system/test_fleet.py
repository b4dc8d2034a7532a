"""A fleet of real processes is hurt under load: every request is answered once, with its own answer, and by its deadline.

How quickly is a matter of the machine, and measured by `python -m loadtest.fleet_faults`.
"""

import pytest

from loadtest.fleet_faults import FAULTS
from loadtest.fleet_rig import SHORT, Rig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    "name", ["worker_killed", "worker_stopped", "worker_dies_unacknowledged", "redis_restarted", "redis_emptied"]
)
def test_no_request_is_lost_doubled_or_mixed_up(name: str) -> None:
    fault = FAULTS[name]
    with Rig(**fault.rig) as rig:
        verdict = fault.run(rig, SHORT).verdict
    assert verdict.faults() == []
    assert verdict.requests > 100
    assert set(verdict.statuses) == {200}, verdict
