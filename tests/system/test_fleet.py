"""A fleet of real processes is hurt under load: every request is answered once, with its own answer, and by its deadline.

How quickly is a matter of the machine, and measured by `python -m loadtest.fleet_faults`. One fleet goes through all of
it, as it would in its life: what one fault leaves behind is there when the next one comes.
"""

from collections.abc import Iterator

import pytest

from loadtest.fleet_faults import FAULTS, POISON
from loadtest.fleet_rig import SHORT, Rig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig(workers=3, gateways=2, crash=str(POISON), allow_crash="true") as rig:
        yield rig


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "redis_restarted",
        "redis_emptied",
        "redis_frozen",
        "redis_full",
        "gateway_stopped",
        "cancel_storm",
        "gateway_killed",
        "worker_dies_unacknowledged",
        "worker_killed",
        "worker_poisoned",
    ],
)
def test_no_request_is_lost_doubled_or_mixed_up(name: str, rig: Rig) -> None:
    rig.heal()
    outcome = FAULTS[name].run(rig, SHORT)
    assert outcome.broken == []
