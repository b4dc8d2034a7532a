"""`pb_utils.Tensor` and Triton's names and numbers of element types, for the code of Python models.

A tensor of this module is one of the gateway with another face: `to_gateway` and `from_gateway` copy nothing that need
not be. Everything is in CPU memory. The names are Triton's python_backend's.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gateway import types
from gateway.engines.python.errors import TritonModelException
from gateway.types import Array, DataType

_ORDER = [
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
    "BF16",
]
_NUMBERS = {DataType[name]: number for number, name in enumerate(_ORDER, start=1)}  # TRITONSERVER_DataType
_DATATYPES = {number: datatype for datatype, number in _NUMBERS.items()}
_CPU = 1  # DLPack's kDLCPU


def datatype_of(dtype: npt.DTypeLike) -> DataType | None:
    """The element type that arrays of a numpy type hold; None for what the protocol has no type for."""
    kind = np.dtype(dtype)
    if kind.kind in "OS":
        return DataType.BYTES
    native = kind.newbyteorder("=")
    return next((each for each in _NUMBERS if each is not DataType.BF16 and each.dtype == native), None)


def numpy_type(datatype: DataType) -> Any:
    """The numpy type of a scalar, as Triton gives it: `np.float32`, and `np.object_` for strings."""
    return np.object_ if datatype is DataType.BYTES else datatype.dtype.type


def triton_to_numpy_type(data_type: int) -> Any:
    """The numpy type of a TRITONSERVER_DataType number; None for one that numpy does not have."""
    datatype = _DATATYPES.get(int(data_type))
    return None if datatype is None or datatype is DataType.BF16 else numpy_type(datatype)


def numpy_to_triton_type(data_type: npt.DTypeLike) -> int | None:
    """The TRITONSERVER_DataType number of a numpy type; None for one that Triton does not have."""
    datatype = datatype_of(data_type)
    return None if datatype is None else _NUMBERS[datatype]


def triton_string_to_numpy(triton_type_string: str) -> Any:
    """The numpy type of a configuration's `data_type`, e.g. TYPE_FP32 or TYPE_STRING."""
    name = "BYTES" if triton_type_string == "TYPE_STRING" else triton_type_string.removeprefix("TYPE_")
    return numpy_type(DataType[name])


def serialize_byte_tensor(input_tensor: Array) -> bytes | None:
    """An array of strings on the wire, each with its length before it; None for one without elements or of numbers."""
    if input_tensor.size == 0 or datatype_of(input_tensor.dtype) is not DataType.BYTES:
        return None
    return types.encode_bytes(as_bytes(input_tensor))


def deserialize_bytes_tensor(encoded_tensor: types.Buffer) -> Array:
    """The strings of wire bytes, as a flat array of `bytes`."""
    view, offset, count = memoryview(encoded_tensor), 0, 0
    while offset < len(view):
        offset += 4 + int.from_bytes(view[offset : offset + 4], "little")
        count += 1
    return types.decode_bytes(encoded_tensor, count)


def as_bytes(array: Array) -> Array:
    """An array of strings as one of `bytes` objects; whatever is not `bytes` is written as its text in UTF-8."""
    elements = [each if isinstance(each, bytes) else str(each).encode() for each in array.reshape(-1).tolist()]
    result = np.empty(len(elements), dtype=object)
    result[:] = elements
    return result.reshape(array.shape)


class Tensor:
    """A named array, an input or an output of a model."""

    def __init__(self, name: str, numpy_array: Array) -> None:
        """Raises `TritonModelException` for an array of a type that Triton does not have."""
        if not isinstance(numpy_array, np.ndarray):
            raise TritonModelException(f"Tensor '{name}' must be made from a numpy array, got {type(numpy_array)}")
        datatype = datatype_of(numpy_array.dtype)
        if datatype is None:
            raise TritonModelException(
                f"Tensor dtype used for numpy_array is not support by Python backend: tensor '{name}' is "
                f"{numpy_array.dtype}. Please use np.object_ instead for strings."
            )
        self._hold(name, datatype, np.ascontiguousarray(numpy_array) if numpy_array.ndim else numpy_array)

    @classmethod
    def from_gateway(cls, name: str, datatype: DataType, array: Array) -> Self:
        """A tensor around an array as the gateway has it: `array.dtype` is `datatype.dtype`."""
        tensor = cls.__new__(cls)
        tensor._hold(name, datatype, array)  # noqa: SLF001 - this class's own
        return tensor

    def to_gateway(self) -> types.Tensor:
        """The same as the gateway has it."""
        array = as_bytes(self._array) if self._datatype is DataType.BYTES else self._array
        return types.Tensor.from_array(self._datatype, array.astype(self._datatype.dtype, copy=False))

    def name(self) -> str:
        """Its name."""
        return self._name

    def triton_dtype(self) -> int:
        """Its element type as a TRITONSERVER_DataType number."""
        return _NUMBERS[self._datatype]

    def shape(self) -> list[int]:
        """Its dimensions, the batch dimension included."""
        return list(self._array.shape)

    def as_numpy(self) -> Array:
        """Its array; strings are `bytes` in an object array. Raises for BF16, which numpy does not have."""
        if self._datatype is DataType.BF16:
            raise TritonModelException("tensor dtype is bf16 and cannot be converted to numpy.")
        return self._array

    def is_cpu(self) -> bool:
        """Whether it is in CPU memory, which it always is."""
        return True

    def to_dlpack(self) -> Any:
        """A DLPack capsule over its memory. Raises for strings and BF16."""
        return self.__dlpack__()

    @classmethod
    def from_dlpack(cls, name: str, tensor: Any) -> Self:
        """A tensor over the memory of a DLPack capsule, or of an object that gives one. It must be in CPU memory."""
        try:
            return cls(name, np.from_dlpack(tensor if hasattr(tensor, "__dlpack__") else _Capsule(tensor)))
        except (BufferError, RuntimeError, TypeError, ValueError) as problem:
            raise TritonModelException(f"Tensor '{name}' cannot be made from this DLPack: {problem}") from None

    def __dlpack__(self, *, stream: Any = None) -> Any:
        if self._datatype in (DataType.BYTES, DataType.BF16):
            raise TritonModelException(f"a tensor of {self._datatype.name} cannot be converted to DLPack.")
        # The capsules that every framework reads cannot say that their memory is not to be written to.
        writeable = self._array if self._array.flags.writeable else self._array.copy()
        return writeable.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU, 0

    def _hold(self, name: str, datatype: DataType, array: Array) -> None:
        self._name = name
        self._datatype = datatype
        self._array = array


class _Capsule:
    """A bare DLPack capsule in the form that numpy takes."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU, 0
