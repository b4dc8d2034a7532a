"""Which requests are refused unread: those like others that were refused, and what a crowded event loop has no time for."""

from dataclasses import replace

import pytest

from gateway.config.model import ResponseCache
from gateway.errors import Overloaded
from gateway.queues.base import PoolState, VersionState
from gateway.queues.memory import MemoryQueue
from gateway.service import Behind, Service
from gateway.service.service import ServiceOptions
from gateway.statistics import Statistics
from tests.support import model_config

TARGET = ("m", "")
NEAR = Behind(0.004, 0)  # a loop that has no time to read what it would refuse
MANY = 160


class Admission:
    """Refuses what is due before `closed`."""

    asks_all = False

    def __init__(self):
        self.closed = 0.0
        self.told = 0

    def turn_away(self, deadline):
        return 0.5 if deadline <= self.closed else None

    def turned_away(self, times):
        self.told += times


class Rig:
    def __init__(self):
        self.queue, self.admission, self.statistics = MemoryQueue(), Admission(), Statistics()
        self.service = Service(self.queue, self.statistics, self.names, ServiceOptions())
        self.publish()
        self.service.model_config("m")  # somebody has asked for it before

    async def names(self):
        return ["m"]

    def publish(self, **config):
        version = VersionState("1", "READY", config=replace(model_config(), **config), admission=self.admission)
        self.queue.publish(PoolState("m", (version,)))

    def ask(self, behind=NEAR, *, left=1.0, now=100.0):
        return self.service.turn_away(TARGET, now, now + left, behind)

    def refused(self, behind=NEAR, *, times=MANY, **more):
        return sum(self.ask(behind, **more) is not None for _ in range(times))


@pytest.fixture
def rig():
    return Rig()


def test_an_open_model_is_asked_about_everything(rig):
    assert rig.refused() == 0


def test_most_of_what_is_like_the_refused_is_refused_and_one_in_sixteen_is_read(rig):
    rig.admission.closed = 101.0
    assert rig.refused() == MANY * 15 // 16
    assert rig.ask(left=1.1) is None


def test_what_the_loop_has_time_for_is_read_all_the_same(rig):
    rig.admission.closed = 200.0
    idle = Behind(0.0, 0)
    assert rig.refused(idle, times=1) == 0
    assert rig.refused(idle, times=10) == 10, "but not more often than costs next to nothing"
    assert rig.refused(idle, times=1, now=100.01) == 0


def test_how_long_it_waits_for_the_loop_is_time_that_it_does_not_have(rig):
    rig.admission.closed = 101.0
    assert rig.refused(left=1.003) > 0
    assert rig.refused(left=1.005) == 0


def test_a_loop_that_is_far_behind_lets_few_in(rig):
    assert rig.refused(Behind(0.1, 0), left=1.0) == 0
    assert rig.refused(Behind(0.15, 0), left=1.0) == MANY * 15 // 16
    assert rig.ask(Behind(0.15, 0), left=1.0) == pytest.approx(0.2)
    assert rig.refused(Behind(0.009, 0), left=0.02) == 0, "a moment is no sign of anything"


def test_a_crowd_on_its_way_is_enough_where_others_were_just_refused(rig):
    crowd = Behind(0.004, 100)
    assert rig.refused(crowd) == 0
    rig.admission.closed = 101.0
    assert rig.refused(crowd) > 0
    rig.admission.closed = 0.0
    assert rig.refused(crowd, now=100.1) > 0
    assert rig.refused(crowd, now=100.3) == 0


def test_a_model_that_changed_or_that_nobody_knows_turns_nobody_away(rig):
    rig.admission.closed = 200.0
    assert rig.service.turn_away(("other", ""), 100.0, 101.0, NEAR) is None
    rig.publish()
    assert rig.refused() == 0


def test_what_may_be_in_the_response_cache_is_looked_for(rig):
    rig.publish(response_cache=ResponseCache())
    rig.service.model_config("m")
    rig.admission.closed = 200.0
    assert rig.refused() == 0


def test_a_server_that_drains_says_so_itself(rig):
    rig.admission.closed = 200.0
    rig.service.drain()
    assert rig.refused() == 0


def test_those_turned_away_are_counted_as_refused_for_overload(rig):
    rig.service.turned_away(TARGET, Overloaded("full"), 3)
    rig.service.turned_away(("gone", ""), Overloaded("full"), 5)
    counted = rig.statistics.of("m", "1")
    assert (counted.refused, counted.failures["REJECTED"], rig.admission.told) == ({"overload": 3}, 3, 3)
