"""What the command line does to its process before it serves."""

import os

import pytest

from gateway import cli


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a Linux setting")
@pytest.mark.parametrize(
    ("before", "after"), [("SCHED_OTHER", "SCHED_BATCH"), ("SCHED_IDLE", None), ("SCHED_RR", None)]
)
def test_a_scheduling_policy_that_somebody_chose_is_left(monkeypatch, before, after):
    chosen = []
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: getattr(os, before))
    monkeypatch.setattr(os, "sched_setscheduler", lambda _, policy, __: chosen.append(policy))
    cli._let_threads_finish()
    assert chosen == ([getattr(os, after)] if after else [])


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a Linux setting")
def test_a_sandbox_may_forbid_a_scheduling_policy(monkeypatch):
    def forbidden(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_OTHER)
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    cli._let_threads_finish()
