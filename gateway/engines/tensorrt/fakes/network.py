"""What the fake TensorRT's plans are made of, and a way to make one without its builder."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"a fake of a TensorRT plan\n"
VERSION = "10.0"

_KINDS = {  # onnx.TensorProto's types that TensorRT has
    1: "FLOAT",
    10: "HALF",
    16: "BF16",
    3: "INT8",
    6: "INT32",
    7: "INT64",
    2: "UINT8",
    9: "BOOL",
}
_DTYPES = {
    "FLOAT": "<f4",
    "HALF": "<f2",
    "BF16": "<u2",
    "INT8": "i1",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "u1",
    "BOOL": "?",
}


@dataclass(frozen=True)
class Tensor:
    """An input or an output; `depends_on_data` is an output of which nobody knows the shape beforehand."""

    name: str
    kind: str
    shape: Sequence[int]
    is_input: bool
    location: str = "DEVICE"
    depends_on_data: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of its elements."""
        return np.dtype(_DTYPES[self.kind])


def tensors(model: Path | bytes) -> list[Tensor]:
    """The inputs and outputs of an ONNX file. Raises `ValueError` for a type that TensorRT has not."""
    import onnx

    graph = (onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)).graph
    given = {each.name for each in graph.initializer}
    return [
        *(_tensor(value, is_input=True) for value in graph.input if value.name not in given),
        *(_tensor(value, is_input=False) for value in graph.output),
    ]


def serialize(
    model: bytes,
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]],
    written_by: str = VERSION,
    faults: Mapping[str, float] | None = None,
    **changes: Any,
) -> bytes:
    """A fake plan of an ONNX file. `changes` are of its tensors, by name: a mapping of `Tensor`'s fields."""
    described = [asdict(each) | changes.get(each.name, {}) for each in tensors(model)]
    body = {
        "version": written_by,
        "tensors": described,
        "profiles": profiles,
        "faults": faults or {},
        "onnx": base64.b64encode(model).decode(),
    }
    return MAGIC + json.dumps(body).encode()


def _tensor(value: Any, *, is_input: bool) -> Tensor:
    kind = value.type.tensor_type.elem_type
    if kind not in _KINDS:
        raise ValueError(f"'{value.name}' has a type that TensorRT has not")
    shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
    return Tensor(value.name, _KINDS[kind], shape, is_input)
