"""The gate: whether an artefact answers as the FP32 model does, and is worth having. Pure functions of what was measured.

What is compared depends on the kind of model: `classifier` (top-1 and top-5 agreement, and labelled accuracy where
there are labels), `embedding` (cosine, and recall@10: how many of a row's ten nearest neighbours stay) or `numeric`
(mean and greatest error, each as a share of the values' own spread). The kind is the parameter `gate.kind`, or inferred
and said so. Every threshold is a parameter of the model's configuration, e.g.

    parameters { key: "gate.top1_agreement" value { string_value: "0.94" } }

The defaults are strict: whoever lowers one has looked at the report. A figure that is missing passes nothing: with fewer
held-out rows than `gate.held_out_rows` the verdict is `unproven`, however good they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gateway import errors
from gateway.artefacts import Measured, Verdict
from gateway.config.model import ModelConfig
from gateway.types import Array

KINDS = ("classifier", "embedding", "numeric")
_PREFIX = "gate."
_NEIGHBOURS = 10


class Limit(NamedTuple):
    """A threshold: `least` or at most `value`."""

    value: float
    least: bool
    meaning: str


DEFAULTS = {
    "top1_agreement": Limit(0.98, True, "share of rows whose best class is FP32's"),
    "top5_agreement": Limit(0.995, True, "share of rows whose five best classes hold FP32's best"),
    "accuracy_loss": Limit(0.004, False, "labelled accuracy lost, as a share of the rows"),
    "cosine_mean": Limit(0.99, True, "cosine with FP32's embedding, mean"),
    "cosine_min": Limit(0.95, True, "cosine with FP32's embedding, of the worst row"),
    "recall_at_10": Limit(0.97, True, "share of the ten nearest neighbours that stay"),
    "mean_error": Limit(0.01, False, "mean absolute error over the standard deviation of FP32's values"),
    "max_error": Limit(0.1, False, "greatest absolute error over the greatest absolute value of FP32"),
    "batch_drift": Limit(0.001, False, "how far a row's answer moves with its batch-mates, over FP32's greatest value"),
    "speedup": Limit(1.05, True, "throughput over FP32's, geometric mean over the batch sizes"),
    "held_out_rows": Limit(100, True, "held-out rows that a verdict takes"),
}
_OF_KIND = {
    "classifier": ("top1_agreement", "top5_agreement", "accuracy_loss"),
    "embedding": ("cosine_mean", "cosine_min", "recall_at_10"),
    "numeric": ("mean_error", "max_error"),
}


@dataclass(frozen=True)
class Gate:
    """What one model's artefacts are held to. `why` says how the kind was found."""

    kind: str
    why: str
    limits: Mapping[str, Limit]

    def compare(self, expected: Sequence[Array], found: Sequence[Array], labels: Array | None) -> dict[str, float]:
        """The figures of an artefact's outputs against FP32's; `labels` are the right classes, if known."""
        if any(not np.isfinite(output).all() for output in found if output.dtype.kind == "f"):
            return {"non_finite": 1.0}
        if self.kind == "classifier":
            return _classes(expected[0], found[0], labels)
        if self.kind == "embedding":
            return _embeddings(expected[0], found[0])
        return _errors(expected, found)

    def thresholds(self, accuracy: Mapping[str, float], *, timed: bool) -> dict[str, float]:
        """The limits that apply to these figures."""
        names = [*accuracy, "held_out_rows", *(["speedup"] if timed else [])]
        return {name: self.limits[name].value for name in names if name in self.limits}

    def judge(
        self, accuracy: Mapping[str, float], speed: Sequence[Measured], rows: int, unproven: str = ""
    ) -> tuple[Verdict, tuple[str, ...]]:
        """The verdict, and in words why it is not `passed`. `unproven` says why nothing can be proven here, if so."""
        reasons = []
        if "non_finite" in accuracy:
            reasons.append("it answers with NaN or infinity")
        reasons += [
            text for name, value in accuracy.items() if name in self.limits and (text := self._short(name, value))
        ]
        if speed and (text := self._short("speedup", speedup(speed))):
            reasons.append(text + ": " + ", ".join(_told(each) for each in speed))
        if reasons:
            return "failed", tuple(reasons)
        least = self.limits["held_out_rows"].value
        if rows < least:
            return "unproven", (f"judged on {rows} held-out rows, and a verdict takes {least:g}",)
        return ("unproven", (unproven,)) if unproven else ("passed", ())

    def _short(self, name: str, value: float) -> str:
        limit = self.limits[name]
        if value >= limit.value if limit.least else value <= limit.value:
            return ""
        return f"{name} {value:.4g}, {'at least' if limit.least else 'at most'} {limit.value:g} is asked for"


def gate(config: ModelConfig, reference: Sequence[Array], *, labelled: bool) -> Gate:
    """The gate of a model, from its parameters and from FP32's answers. Raises `InvalidArgument` for a wrong parameter."""
    kind, why = _kind(config, reference, labelled=labelled)
    names = {*_OF_KIND[kind], "batch_drift", "speedup", "held_out_rows"}
    limits = {name: limit for name, limit in DEFAULTS.items() if name in names}
    for key, text in config.parameters.items():
        name = key.removeprefix(_PREFIX)
        if not key.startswith(_PREFIX) or name == "kind":
            continue
        if name not in DEFAULTS:
            raise errors.InvalidArgument(
                f"model '{config.name}' has a parameter '{key}'; there are {_PREFIX}kind, {_PREFIX}{f', {_PREFIX}'.join(DEFAULTS)}"
            )
        if name in names:
            limits[name] = limits[name]._replace(value=_number(config, key, text))
    return Gate(kind, why, limits)


def speedup(speed: Sequence[Measured]) -> float:
    """Times FP32's throughput, the geometric mean over the batch sizes."""
    return math.exp(sum(math.log(each.reference_seconds / each.seconds) for each in speed) / len(speed))


def drift(alone: Sequence[Array], among: Sequence[Array]) -> float:
    """How far answers move with their batch-mates: the greatest difference over the greatest absolute value."""
    return max(_greatest(one, other) for one, other in zip(alone, among, strict=True))


def _kind(config: ModelConfig, reference: Sequence[Array], *, labelled: bool) -> tuple[str, str]:
    given = config.parameters.get(_PREFIX + "kind")
    if given is not None:
        if given not in KINDS:
            raise errors.InvalidArgument(
                f"model '{config.name}' has {_PREFIX}kind '{given}'; there are: {', '.join(KINDS)}"
            )
        return given, "by the parameter gate.kind"
    first = reference[0]
    if first.ndim != 2 or first.dtype.kind != "f":
        return "numeric", f"inferred: the output has {first.ndim} dimensions of {first.dtype}"
    if labelled or config.outputs[0].labels:
        return "classifier", "inferred: there are labels"
    norms = np.linalg.norm(first, axis=1)
    if first.shape[1] > 1 and np.allclose(norms, 1, atol=1e-3) and (first < 0).any():
        return "embedding", "inferred: the answers are unit vectors"
    return "numeric", "inferred: there are no labels, and the answers are no unit vectors"


def _number(config: ModelConfig, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise errors.InvalidArgument(f"parameter '{key}' of model '{config.name}' must be a number, got '{text}'")
    return value


def _classes(expected: Array, found: Array, labels: Array | None) -> dict[str, float]:
    best, mine = expected.argmax(axis=1), found.argmax(axis=1)
    figures = {"top1_agreement": float((best == mine).mean())}
    if expected.shape[1] > 5:
        five = np.argpartition(-found, 5, axis=1)[:, :5]
        figures["top5_agreement"] = float((five == best[:, None]).any(axis=1).mean())
    figures["logits_cosine"] = float(_cosine(expected, found).mean())
    if labels is not None:
        figures["accuracy"] = float((mine == labels).mean())
        figures["reference_accuracy"] = float((best == labels).mean())
        figures["accuracy_loss"] = figures["reference_accuracy"] - figures["accuracy"]
    return figures


def _embeddings(expected: Array, found: Array) -> dict[str, float]:
    cosine = _cosine(expected, found)
    figures = {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
    if len(expected) > _NEIGHBOURS:
        pairs = zip(_nearest(expected), _nearest(found), strict=True)
        figures["recall_at_10"] = float(np.mean([len(set(a) & set(b)) / _NEIGHBOURS for a, b in pairs]))
    return figures


def _errors(expected: Sequence[Array], found: Sequence[Array]) -> dict[str, float]:
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(expected, found, strict=True)]
    spread = [float(abs(a - b).mean() / max(a.std(), 1e-12)) for a, b in pairs]
    return {"mean_error": max(spread), "max_error": max(_greatest(a, b) for a, b in pairs)}


def _greatest(expected: Array, found: Array) -> float:
    return float(abs(expected - found).max(initial=0) / max(float(abs(expected).max(initial=0)), 1e-12))


def _cosine(one: Array, other: Array) -> Array:
    length = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / np.maximum(length, 1e-12)  # type: ignore[no-any-return]


def _nearest(vectors: Array) -> Array:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, :_NEIGHBOURS]


def _told(each: Measured) -> str:
    return f"x{each.reference_seconds / each.seconds:.2f} at batch {each.rows}"
