"""An edge gateway whose far one fails: every request is answered right and once, and the far one is used again. Real processes.

`python -m loadtest.edge_faults` is the same with a deadline of 150 ms, at more load, and timed.
"""

from __future__ import annotations

import json

import pytest

from loadtest.edge_faults import hurt, table
from loadtest.edge_rig import Edge
from tests.remote_support import SCHEMES

pytestmark = pytest.mark.slow

FAULTS = ("cut", "refused", "slow", "killed")


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_answers_never_stop_and_say_which_engine_gave_them(scheme: str) -> None:
    async with Edge(scheme, deadline_ms=1000.0, rate=30.0) as edge:
        outcomes = [(scheme, await hurt(edge, name, 3.0)) for name in FAULTS]
        log = [json.loads(line) for line in edge.near.log.read_text().splitlines() if line.startswith("{")]
    assert [text for _, each in outcomes for text in each.broken] == [], table(outcomes)
    assert all(each.local for _, each in outcomes)
    changes = [line["now"] for line in log if line["event"] == "engine_changed"]
    assert changes.count("cpu") >= 3  # a link that is only slow stays in use for those who can wait
    assert changes.count("remote") >= 3
