"""FP8 and INT8 by NVIDIA's modelopt, run as a command in a virtual environment of its own (`--modelopt-python`).

It pins versions of onnxruntime-gpu and onnx that a server must not have, and takes 2 GB with torch. Make the
environment once: `python3 -m venv modelopt && modelopt/bin/pip install 'nvidia-modelopt[onnx]'`.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from gateway import errors
from gateway.build.data import together
from gateway.build.recipes.base import Job, Recipe
from gateway.build.source import Source, save

_SECONDS = 1800
_REMEDY = (
    "make an environment with `python3 -m venv modelopt && modelopt/bin/pip install 'nvidia-modelopt[onnx]'` and give "
    "--modelopt-python modelopt/bin/python"
)


def _multiplies(source: Source) -> str:
    suited = {"Conv", "Gemm", "MatMul"} & set(source.operators)
    return "" if suited else "it has no convolution and no matrix multiplication"


def _quantize(job: Job, mode: str) -> None:
    if job.modelopt_python is None:
        raise errors.Unavailable(f"needs NVIDIA's modelopt, which must not share the server's environment; {_REMEDY}")
    alike = [row for row in job.calibration if row.shapes == job.calibration[0].shapes]
    if job.source.config.max_batch_size == 0:
        alike = alike[:1]  # modelopt divides an array by its first axis, which is not one of rows here
    with tempfile.TemporaryDirectory(dir=job.folder, prefix=".") as scratch:
        data, written = Path(scratch) / "calibration.npz", Path(scratch) / "quantized.onnx"
        np.savez(data, allow_pickle=False, **together(alike))
        command = [
            str(job.modelopt_python), "-m", "modelopt.onnx.quantization",
            "--onnx_path", str(job.source.file.resolve()), "--quantize_mode", mode, "--calibration_method", "max",
            "--calibration_data_path", str(data.resolve()), "--calibration_eps", "cpu",
            "--output_path", str(written.resolve()),
        ]  # fmt: skip
        _run(command)
        import onnx

        save(onnx.load(written), job.file)
        job.tick(len(job.calibration))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603 - the operator's own interpreter
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise errors.Unavailable(f"{command[0]} cannot run modelopt: {problem}; {_REMEDY}") from problem
    if "No module named" in done.stderr and "modelopt" in done.stderr and done.returncode:
        raise errors.Unavailable(f"{command[0]} has no package modelopt; {_REMEDY}")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise errors.Internal(f"modelopt ended with status {done.returncode}: {last[0][:300]}")


RECIPES = (
    Recipe("trt-fp8", "FP8", "tensorrt", partial(_quantize, mode="fp8"), _multiplies, True, backend="tensorrt"),
    Recipe(
        "trt-int8-modelopt", "INT8", "tensorrt", partial(_quantize, mode="int8"), _multiplies, True, backend="tensorrt"
    ),
)
