"""Real inputs to calibrate with and to judge by: read from arrays, pictures or recorded requests, a row at a time.

A path is one file or a folder, read in the order of names, folders within included:

- `.npz`: arrays by input name, rows first; `labels`, if there, holds the right class of each row. The one array of a
  model with one input may have any name.
- `.npy`: the same for a model with one input.
- pictures (`.jpg`, `.png`, ...): see `images`; a picture in a folder named by a class number, or by a line of the model's labels, is labelled.
- a recording of `gateway serve --record DIR --record-inputs`: the requests to this model.

Integers become floating point where the model takes that. Rows are told apart by the hash of their bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gateway import errors
from gateway.build import images
from gateway.config.model import ModelConfig, TensorConfig
from gateway.types import Array, DataType, decode_bytes

_LABELS = ("labels", "label")


@dataclass(frozen=True)
class Row:
    """What one run of one row takes: arrays by input name, the batch dimension of 1 included. `label` -1 is unknown."""

    inputs: Mapping[str, Array]
    label: int = -1

    @cached_property
    def digest(self) -> str:
        """Tells rows apart that differ in any byte of any input."""
        found = hashlib.sha256()
        for name, array in sorted(self.inputs.items()):
            found.update(f"{name} {array.dtype} {array.shape} ".encode())
            found.update(repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).data)
        return found.hexdigest()

    @cached_property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Rows of equal shapes can share a batch."""
        return tuple((name, array.shape) for name, array in self.inputs.items())


def digest(rows: Sequence[Row]) -> str:
    """Tells sets of rows apart, their order included."""
    return hashlib.sha256("".join(row.digest for row in rows).encode()).hexdigest()


def batches(rows: Sequence[Row], size: int) -> Iterator[dict[str, Array]]:
    """The rows in order, as few batches of at most `size` as their shapes allow."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and end - start < size and rows[end].shapes == rows[start].shapes:
            end += 1
        yield together(rows[start:end])
        start = end


def together(rows: Sequence[Row]) -> dict[str, Array]:
    """One batch of rows of equal shapes."""
    if len(rows) == 1:
        return dict(rows[0].inputs)
    return {name: np.concatenate([row.inputs[name] for row in rows]) for name in rows[0].inputs}


def read(path: Path, config: ModelConfig, most: int) -> list[Row]:
    """The rows at a path, at most so many, of files chosen without regard to their order. Raises `InvalidArgument` naming the file when there is none or one does not fit the model."""
    if not path.exists():
        raise errors.InvalidArgument(f"there is no data at '{path}'; give a .npy or .npz file or a folder")
    reader = _Reader(config)
    found = reader.folder(path, most) if path.is_dir() else reader.file(path, path.parent)
    rows = list(islice(found, most))
    if not rows:
        raise errors.InvalidArgument(
            f"'{path}' holds no data for model '{config.name}': .npy or .npz files, pictures, or a recording with inputs"
        )
    return rows


def apart(calibration: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Raise `InvalidArgument` when a row is in both: what was learned from must not be judged by."""
    known = {row.digest for row in calibration}
    shared = sum(row.digest in known for row in held_out)
    if shared:
        raise errors.InvalidArgument(
            f"{shared} of {len(held_out)} held-out rows are in the calibration data too; an artefact must be judged on "
            "data it was not made with. Remove them from one of the two"
        )


def split(rows: Sequence[Row], calibration: int) -> tuple[list[Row], list[Row]]:
    """Divide one set of rows into calibration, at most so many and a third at most, and held-out rows, by their hashes.

    Rows that occur twice are kept once.
    """
    unique = list({row.digest: row for row in rows}.values())
    count = min(calibration, len(unique) // 3)
    chosen = {row.digest for row in sorted(unique, key=lambda row: row.digest)[:count]}
    return [row for row in unique if row.digest in chosen], [row for row in unique if row.digest not in chosen]


class _Reader:
    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._inputs = {tensor.name: tensor for tensor in config.inputs}
        self._batched = config.max_batch_size > 0
        self._classes = {label: index for output in config.outputs for index, label in enumerate(output.labels)}

    @cached_property
    def _preprocess(self) -> images.Preprocess:
        return images.preprocess(self._config)

    def folder(self, path: Path, most: int) -> Iterator[Row]:
        recordings = sorted(path.glob("arrivals-*.jsonl"))
        for recording in recordings:
            yield from self._recording(recording)
        if not recordings:
            files = sorted(each for each in path.rglob("*") if each.is_file())
            # Folders are often in the order of their classes, and the first files then of one.
            chosen = sorted(files, key=lambda file: hashlib.sha256(bytes(file.relative_to(path))).digest())[:most]
            for file in sorted(chosen):
                yield from self.file(file, path)

    def file(self, file: Path, top: Path) -> Iterator[Row]:
        """The rows of one file; those of unknown kinds have none."""
        kind = file.suffix.lower()
        if kind in images.KINDS:
            label = self._class(file.parent.name) if file.parent != top else -1
            yield Row(self._preprocess.read(file), label)
        elif kind in (".npy", ".npz"):
            try:
                arrays = _load(file)
            except (OSError, ValueError) as problem:
                raise errors.InvalidArgument(f"'{file.name}' cannot be read as arrays: {problem}") from None
            yield from self._rows(arrays, file.name)

    def _recording(self, file: Path) -> Iterator[Row]:
        for arrival in _arrivals(file):
            if arrival["model"] == self._config.name and "inputs" in arrival:
                arrays = _load(file.parent / arrival["inputs"])
                for name, shape in arrival["strings"].items():
                    elements = decode_bytes(arrays[name].tobytes(), int(np.prod(shape)))
                    arrays[name] = elements.reshape(shape)
                yield from self._rows(arrays, arrival["inputs"])

    def _class(self, name: str) -> int:
        return int(name) if name.isdecimal() else self._classes.get(name, -1)

    def _rows(self, arrays: dict[str, Array], where: str) -> Iterator[Row]:
        labels = next((arrays.pop(name) for name in _LABELS if name in arrays and name not in self._inputs), None)
        fitting = self._inputs_of(arrays, where)
        if not self._batched:
            yield Row(fitting)
            return
        counts = {len(array) for array in fitting.values()} | ({len(labels)} if labels is not None else set())
        if len(counts) != 1:
            raise errors.InvalidArgument(f"the arrays of '{where}' have different numbers of rows: {sorted(counts)}")
        for index in range(counts.pop()):
            inputs = {name: array[index : index + 1] for name, array in fitting.items()}
            yield Row(inputs, int(labels[index]) if labels is not None else -1)

    def _inputs_of(self, arrays: dict[str, Array], where: str) -> dict[str, Array]:
        if len(arrays) == len(self._inputs) == 1:
            arrays = dict(zip(self._inputs, arrays.values(), strict=True))
        missing = [name for name, tensor in self._inputs.items() if name not in arrays and not tensor.optional]
        if missing:
            raise errors.InvalidArgument(
                f"'{where}' has no array '{missing[0]}'; it has {', '.join(arrays)}, and the model takes "
                f"{', '.join(self._inputs)}"
            )
        return {name: self._fit(arrays[name], self._inputs[name], where) for name in self._inputs if name in arrays}

    def _fit(self, array: Array, tensor: TensorConfig, where: str) -> Array:
        dims = (-1, *tensor.dims) if self._batched else tensor.dims
        if len(array.shape) != len(dims) or any(
            want not in (-1, got) for want, got in zip(dims, array.shape, strict=True)
        ):
            raise errors.InvalidArgument(
                f"'{where}' has an array of shape {list(array.shape)} for input '{tensor.name}', which takes {list(dims)}; "
                "-1 is any size"
            )
        wanted = tensor.datatype.dtype
        if tensor.reshape is not None:
            array = array.reshape((*array.shape[: int(self._batched)], *tensor.reshape))
        if array.dtype == wanted or tensor.datatype is DataType.BYTES:
            return array
        if np.can_cast(array.dtype, wanted, "same_kind") or (array.dtype.kind in "iu" and wanted.kind == "f"):
            return array.astype(wanted)
        raise errors.InvalidArgument(
            f"'{where}' has {array.dtype} for input '{tensor.name}', which takes {tensor.datatype.name}; convert it"
        )


def _load(file: Path) -> dict[str, Array]:
    """The arrays of a file by name; that of a .npy file has none."""
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return {"": loaded}
    with loaded:
        return dict(loaded)


def _arrivals(file: Path) -> list[dict[str, Any]]:
    """The requests of a recording by their time; the line that a killed server left half written is no request."""
    lines = file.read_text("utf-8").split("\n")[1:-1]
    try:
        return sorted(map(json.loads, lines), key=lambda arrival: float(arrival["t"]))
    except (ValueError, KeyError, TypeError) as problem:
        raise errors.InvalidArgument(f"'{file.name}' is not a recording of this version: {problem!r}") from None
