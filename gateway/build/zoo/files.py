"""Owns the shape of a model folder on disk: finds source weights in installed packages, writes the Triton layout.

It promises that source weights are the exact bytes the recipe was written for, and that a folder's files come out the
same for the same inputs. It never downloads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

WIRE_NAMES = {"float32": "FP32", "int64": "INT64"}


class BuildError(RuntimeError):
    """A source file or a rebuilt model is not what its recipe promises; nothing was written for it."""


@dataclass(frozen=True)
class Model:
    """One model folder: the ONNX bytes, its config.pbtxt, and the files beside it by relative name."""

    name: str
    onnx: bytes
    config: str
    beside: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, repository: Path) -> Path:
        """Write the folder under `repository` and return it; files that the recipe does not own are left alone."""
        folder = repository / self.name
        files = {"config.pbtxt": self.config.encode(), "1/model.onnx": self.onnx, **self.beside}
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return folder


def package_file(package: str, name: str, sha256: str) -> Path:
    """Find a data file of an installed package, and refuse it when its content is not what the recipe was written for."""
    path = Path(str(resources.files(package).joinpath(name)))
    if not path.is_file():
        raise BuildError(f"package {package!r} has no file {name!r}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise BuildError(f"{package}/{name}: sha256 is {digest[:12]}..., this recipe is for {sha256[:12]}...")
    return path


def infer_body(request_id: str, inputs: Mapping[str, NDArray[Any]], outputs: list[str]) -> bytes:
    """Encode a ready-to-post V2 inference request, one line per tensor so that a diff of it can be read."""
    tensors = [_tensor(name, array) for name, array in inputs.items()]
    wanted = ", ".join(json.dumps({"name": name}) for name in outputs)
    body = ",\n    ".join(tensors)
    return f'{{\n  "id": {json.dumps(request_id)},\n  "inputs": [\n    {body}\n  ],\n  "outputs": [{wanted}]\n}}\n'.encode()


def _tensor(name: str, array: NDArray[Any]) -> str:
    data = [_number(value) for value in array.ravel()]
    head = {"name": name, "shape": list(array.shape), "datatype": WIRE_NAMES[array.dtype.name], "data": data}
    return json.dumps(head, separators=(",", ":"))


def _number(value: np.generic) -> int | float:
    # 7 instead of 7.0: JSON has one number type, V2 accepts it for FP32, and a picture of small integers halves in size.
    number: float = value.item()
    return int(number) if number == int(number) else number
