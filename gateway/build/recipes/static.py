"""Static quantization with ONNX Runtime's quantizer: ranges measured once on calibration rows, then Q/DQ nodes around operators.

The ranges are the expensive part and the same for every recipe, so they are kept in the build's folder and shared.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gateway.build.data import Row, digest, together
from gateway.build.recipes.base import Job, current, quiet
from gateway.build.source import OPSET, Source, save

_CALIBRATION_BATCH = 8
_MATRICES = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


def quantize(job: Job, *, activations: str, reduce_range: bool = False, options: dict[str, Any] | None = None) -> None:
    """Write the model in QDQ form with signed weights per channel and activations of one type, "QInt8" or "QUInt8"."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationMethod

    with quiet(), tempfile.TemporaryDirectory(dir=job.folder, prefix=".") as scratch:
        prepared, written = Path(scratch) / "prepared.onnx", Path(scratch) / "quantized.onnx"
        _prepare(job.source, prepared)
        quantize_static(
            prepared,
            written,
            _Reader(job),
            quant_format=QuantFormat.QDQ,
            # Around what is no multiplication, transformers lose everything: MiniLM's cosine was .33, and .93 without.
            op_types_to_quantize=_MATRICES if job.source.attends else None,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType[activations],
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            calibration_cache_path=_ranges(job),
            extra_options=options or {},
        )
        import onnx

        save(onnx.load(written), job.file)


def _ranges(job: Job) -> Path:
    parts = f"{job.source.sha256} {digest(job.calibration)} {job.source.attends}"
    return job.folder / f".ranges-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.json"


def _prepare(source: Source, file: Path) -> None:
    """Write the model as the quantizer wants it: of a recent opset, and batch normalisation inside the convolutions."""
    import onnx
    import onnxruntime as ort

    model = current(source.load(), OPSET)
    onnx.save(model, file)
    if "BatchNormalization" in source.operators:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(file)
        options.log_severity_level = 4
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class _Reader:
    """ONNX Runtime's `CalibrationDataReader`: batches of calibration rows, then None."""

    def __init__(self, job: Job) -> None:
        self._rows: Sequence[Row] = job.calibration
        self._most = job.source.rows(_CALIBRATION_BATCH)
        self._tick = job.tick
        self._done = 0

    def get_next(self) -> dict[str, Any] | None:
        """The next batch of rows of equal shapes."""
        start = self._done
        if start >= len(self._rows):
            return None
        end = start + 1
        while end < min(start + self._most, len(self._rows)) and self._rows[end].shapes == self._rows[start].shapes:
            end += 1
        self._done = end
        self._tick(end)
        return together(self._rows[start:end])

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Any]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found
