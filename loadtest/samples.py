"""Real inputs for the demonstration models, and how their right answers are known.

A sample is one row (batch 1) with the values a user of the model would send: a picture's pixels after preprocessing, the
tokens of a sentence, a handwritten digit. It owns no wire format (`bench/bodies.py`) and no model (`model_repo/`).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gateway import artefacts
from loadtest.record import ROOT

Arrays = dict[str, NDArray[np.generic]]

# "the quick brown fox jumps over the lazy dog ." three times, between [CLS] and [SEP]: 32 tokens of the BERT vocabulary
_SENTENCE = [101, *([1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012] * 3), 102]
# the first picture of scikit-learn's digits, a zero
_DIGIT = (
    "0 0 5 13 9 1 0 0 0 0 13 15 10 15 5 0 0 3 15 2 0 11 8 0 0 4 12 0 0 8 8 0 "
    "0 5 8 0 0 9 8 0 0 4 11 0 1 12 7 0 0 2 14 5 10 12 0 0 0 0 6 13 10 0 0 0"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request to one model: its inputs, each with a batch dimension of one."""

    model: str
    inputs: Arrays


def _pattern() -> NDArray[np.float32]:
    """A smooth picture with grain, for a machine without the photograph or without Pillow."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:224, 0:224] / 224.0
    waves = [np.sin(6.3 * (x * (c + 1) + y)) + np.cos(9.1 * (y * (c + 2) - x)) for c in range(3)]
    pixels = np.clip(np.stack(waves) * 50 + 127 + rng.normal(0, 12, (3, 224, 224)), 0, 255)
    return np.floor(pixels).astype(np.float32)


def _picture() -> NDArray[np.float32]:
    """The photograph beside the model, 224 x 224, as the classifier wants its pixels: (x - 127) / 128."""
    photo = ROOT / "model_repo" / "efficientnet_lite0" / "sample.jpg"
    if photo.is_file() and find_spec("PIL"):
        from PIL import Image

        with Image.open(photo) as opened:
            square = opened.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels = np.asarray(square, dtype=np.float32).transpose(2, 0, 1)
    else:
        pixels = _pattern()
    return np.ascontiguousarray((pixels[None] - 127) / 128, dtype=np.float32)


def add_sub(seed: int = 1) -> Sample:
    """Sixteen numbers twice; integers, so that sums are exact in FP32."""
    rng = np.random.default_rng(seed)
    low, high = (rng.integers(-999, 999, (1, 16)).astype(np.float32) for _ in range(2))
    return Sample("add_sub", {"INPUT0": low, "INPUT1": high})


def sample(model: str) -> Sample:
    """The sample of a demonstration model."""
    if model == "add_sub":
        return add_sub()
    if model == "efficientnet_lite0":
        return Sample(model, {"image": _picture()})
    if model == "minilm":
        ids = np.array([_SENTENCE], dtype=np.int64)
        return Sample(
            model, {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        )
    if model == "digits":
        return Sample(model, {"image": np.array(_DIGIT.split(), dtype=np.float32).reshape(1, 1, 8, 8)})
    message = f"no sample for model {model!r}; there is one for add_sub, efficientnet_lite0, minilm and digits"
    raise ValueError(message)


def model_file(repository: Path, model: str) -> Path:
    """The ONNX file that a gateway on this machine runs the highest version of a model from: what the baselines run too."""
    versions = sorted((int(d.name), d) for d in (repository / model).iterdir() if d.name.isdigit())
    for _, folder in reversed(versions):
        if (folder / "model.onnx").is_file():
            return folder / artefacts.choose(folder, artefacts.device_kind("cpu"))[0].file
    message = f"no model.onnx in any version of {model!r} under {repository}"
    raise FileNotFoundError(message)


def expected(path: Path, inputs: Arrays) -> Arrays:
    """What ONNX Runtime answers in this process: the reference every response is compared with."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def matches(got: Arrays, want: Arrays, tolerance: float = 1e-3) -> bool:
    """Whether every wanted output came back with the right type, shape and values."""
    for name, right in want.items():
        answer = got.get(name)
        if answer is None or answer.shape != right.shape or answer.dtype != right.dtype:
            return False
        if not np.allclose(answer.astype(np.float64), right.astype(np.float64), rtol=tolerance, atol=tolerance):
            return False
    return True
