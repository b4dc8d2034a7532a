"""Engines of a real gateway fail under load: every request without poison has its answer, and poison is told what it is.

How quickly is a matter of the machine, and measured by `python -m loadtest.engine_faults`.
"""

import pytest

from gateway.engines.isolated.children import SUPPORTED
from loadtest.engine_faults import FAULTS, SHORT, carry_out

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not SUPPORTED, reason="models run in processes of their own on Linux only"),
]


@pytest.mark.parametrize(
    "name", [name for name in FAULTS if name not in ("exits", "error")]
)  # as others, or in contract
def test_no_request_without_poison_goes_unanswered(name: str) -> None:
    outcome = carry_out(name, SHORT)
    assert outcome.broken == []
    assert outcome.verdict.requests > 40
