"""What `gateway build` says of the files it made: `report.json` as values."""

from __future__ import annotations

from typing import Literal

import msgspec

Verdict = Literal["passed", "failed", "unproven"]


class Measured(msgspec.Struct, frozen=True):
    """Seconds of one run of a number of rows, the best of interleaved runs: of the artefact and of the FP32 model."""

    rows: int
    seconds: float
    reference_seconds: float


class Artefact(msgspec.Struct, frozen=True):
    """One file that a version can be run from, as it fared on one kind of device.

    `file` is relative to the version's folder; `sha256` is of its bytes (`sha256`), `device` the kind of device it was
    gated on (`device_kind`), `accuracy` what was compared, by name (e.g. `top1_agreement`), each with its threshold in
    `thresholds`. `reasons` say in words why it did not pass. A file proven on two kinds of device is listed twice.
    """

    name: str  # "int8", "fp16", "trt-int8", ...
    file: str
    backend: str  # "onnxruntime", "tensorrt"
    precision: str  # "FP32", "INT8", "FP16", "BF16", "FP8", "INT4"
    sha256: str = ""
    bytes: int = 0
    device: str = ""
    verdict: Verdict = "unproven"
    accuracy: dict[str, float] = {}
    thresholds: dict[str, float] = {}
    speed: tuple[Measured, ...] = ()
    reasons: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True):
    """What one build made of a version, and how it fared. Times are Unix seconds."""

    model: str
    version: str
    source_sha256: str  # of the model file that was built from; artefacts of another are stale
    built: float
    device: str
    versions: dict[str, str]  # of gateway and every package that had a hand in it
    samples: dict[str, int]  # how many were used: "calibration", "held_out", "labelled"
    artefacts: tuple[Artefact, ...]
