"""The gate: figures of known answers, the verdicts they give, and thresholds from the configuration."""

import numpy as np
import pytest

from gateway import errors
from gateway.artefacts import Measured
from gateway.build import gate as gates
from gateway.build.gate import gate
from tests.support import model_config, tensor_config

LOGITS = np.eye(12, dtype=np.float32)
FAST, SLOW = Measured(8, 0.5, 1.0), Measured(8, 1.0, 0.9)


def of(reference=LOGITS, *, labelled: bool = False, labels: tuple[str, ...] = (), **parameters: str) -> gates.Gate:
    config = model_config(
        outputs=(tensor_config("OUT", labels=labels),),
        parameters={key.replace("gate_", "gate."): value for key, value in parameters.items()},
    )
    return gate(config, [reference], labelled=labelled)


def unit(rows: int = 40) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(0, 1, (rows, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_kind_is_inferred_and_said():
    assert of(labelled=True).kind == "classifier"
    assert of(labels=("a", "b")).kind == "classifier"
    assert of(unit()).kind == "embedding"
    assert of(np.zeros((4, 3, 2), np.float32)).kind == "numeric"
    assert of(LOGITS * 7).kind == "numeric"
    assert "labels" in of(labelled=True).why
    assert of(unit(), gate_kind="numeric").why == "by the parameter gate.kind"


def test_a_classifier_is_compared_by_classes_and_labels():
    found = LOGITS.copy()
    found[0, 1] = 2  # another best class, the right one still among five
    figures = of(labelled=True).compare([LOGITS], [found], np.array([1, *range(1, 12)]))
    assert figures["top1_agreement"] == pytest.approx(11 / 12)
    assert figures["top5_agreement"] == 1
    assert (figures["accuracy"], figures["reference_accuracy"]) == (1.0, pytest.approx(11 / 12))
    assert figures["accuracy_loss"] < 0


def test_an_embedding_is_compared_by_its_neighbours():
    vectors = unit()
    same = of(vectors).compare([vectors], [vectors * 3], None)
    assert same == {"cosine_mean": pytest.approx(1), "cosine_min": pytest.approx(1), "recall_at_10": 1.0}
    shuffled = of(vectors).compare([vectors], [vectors[::-1]], None)
    assert shuffled["recall_at_10"] < 0.7
    verdict, reasons = of(vectors).judge(shuffled, (FAST,), 400)
    assert verdict == "failed"
    assert any(reason.startswith("recall_at_10 0.") and "at least 0.97" in reason for reason in reasons)


def test_numbers_are_compared_by_their_spread():
    expected = np.array([[0.0, 10.0], [20.0, -10.0]])
    figures = of(expected).compare([expected], [expected + 1], None)
    assert figures == {"mean_error": pytest.approx(1 / expected.std()), "max_error": pytest.approx(1 / 20)}


def test_values_that_are_no_numbers_fail():
    broken = LOGITS.copy()
    broken[3, 3] = np.nan
    judged = of(labelled=True)
    figures = judged.compare([LOGITS], [broken], None)
    assert judged.judge(figures, (), 500) == ("failed", ("it answers with NaN or infinity",))


def test_each_verdict_has_its_reason():
    judged, good = of(labelled=True), {"top1_agreement": 1.0, "batch_drift": 0.0}
    assert judged.judge(good, (FAST,), 200) == ("passed", ())
    assert judged.judge(good, (), 200, "no GPU") == ("unproven", ("no GPU",))
    verdict, (few,) = judged.judge(good, (FAST,), 99)
    assert (verdict, few) == ("unproven", "judged on 99 held-out rows, and a verdict takes 100")
    verdict, (slow,) = judged.judge(good, (SLOW,), 200)
    assert verdict == "failed"
    assert slow == "speedup 0.9, at least 1.05 is asked for: x0.90 at batch 8"
    verdict, (moves,) = judged.judge(good | {"batch_drift": 0.1}, (FAST,), 200)
    assert verdict == "failed"
    assert moves.startswith("batch_drift 0.1, at most 0.001")


def test_a_bad_artefact_is_failed_even_unproven():
    verdict, _ = of(labelled=True).judge({"top1_agreement": 0.5}, (), 200, "no GPU")
    assert verdict == "failed"


def test_thresholds_come_from_the_configuration():
    judged = of(labelled=True, gate_top1_agreement="0.5", gate_speedup="0")
    assert judged.judge({"top1_agreement": 0.6}, (SLOW,), 200)[0] == "passed"
    limits = judged.thresholds({"top1_agreement": 0.6, "logits_cosine": 1.0}, timed=True)
    assert limits == {"top1_agreement": 0.5, "held_out_rows": 100, "speedup": 0}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("gate.top_1", "1", r"there are gate.kind, gate.top1_agreement"),
        ("gate.speedup", "fast", "must be a number"),
        ("gate.kind", "other", "classifier, embedding, numeric"),
    ],
)
def test_a_wrong_parameter_is_refused(key: str, value: str, words: str):
    with pytest.raises(errors.InvalidArgument, match=words):
        gate(model_config(parameters={key: value}), [LOGITS], labelled=True)


def test_speed_is_the_geometric_mean():
    assert gates.speedup([Measured(1, 1.0, 2.0), Measured(8, 1.0, 0.5)]) == pytest.approx(1.0)


def test_drift_is_over_the_greatest_value():
    assert gates.drift([np.array([4.0, -8.0])], [np.array([5.0, -8.0])]) == pytest.approx(1 / 8)
