"""A random model: its ONNX file, its `config.pbtxt` or none, and the tensors that its clients have to know.

The configuration says everything, or leaves inputs, outputs or both to be filled in by Triton's rules (PROTOCOL.md section 11); what
they come to is worked out here from the rules, not asked of the gateway.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from onnx import helper

from loadtest.fuzz import ragged
from loadtest.fuzz.operators import (
    ALL,
    INTEGERS,
    MOST_DIMS,
    NUMBERS,
    TYPES,
    Dim,
    Made,
    Site,
    Value,
    choose,
    tensor_info,
)
from loadtest.fuzz.ragged import Told

Shape = tuple[int, ...]
MOST_BATCH = 16
FILLED_IN = 4  # Triton's max_batch_size for a model that can take batches and does not say how many
_NAMES = ("IN{}", "in_{}:0", "model/layer.{}", "größe {}", 'a "word" \\ {}')
_WAIT = "max_queue_delay_microseconds: 20000"  # so that requests that come together share a batch
_SCHEDULERS = (
    "",
    "dynamic_batching {}\n",
    f"dynamic_batching {{ {_WAIT} }}\n",
    f"dynamic_batching {{ {_WAIT} preserve_ordering: true }}\n",
    f"dynamic_batching {{ {_WAIT} priority_levels: 3 default_priority_level: 2 }}\n",
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output: `dims` as clients see them and `inner` as the model has them, both without the batch, -1 open.

    An output is `like` a ragged input by whose shapes it is cut, `inner` being what the model adds; that input is like itself. `symbols` names the open dimensions in their order; equal names have equal sizes in one request.
    """

    name: str
    datatype: str
    dims: Shape
    inner: Shape
    symbols: tuple[str, ...] = ()
    optional: bool = False
    exact: bool = True
    like: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model and what the gateway has to make of it."""

    name: str
    file: bytes
    config: str | None
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    told: tuple[Told, ...] = ()
    empty: bool = True  # whether a tensor may have no elements

    @property
    def batch(self) -> int:
        """How many dimensions of the batch shapes begin with: 1 or 0."""
        return int(self.max_batch_size > 0)

    @property
    def ragged(self) -> bool:
        """Whether requests of any shapes share batches."""
        return any(each.like for each in self.outputs)


@dataclass(slots=True)
class _Graph:
    """A graph in the making. `batch` is the number of batch dimensions; `defaults` are the inputs with a value of their own."""

    batch: int
    inputs: list[Value]
    defaults: dict[str, Shape]
    made: list[Made]


def make(seed: int, number: int) -> Model:
    """The model of this number; the same each time."""
    rng = np.random.default_rng([seed, number])
    if number % 10 in _RAGGED:
        return _RAGGED[number % 10](f"m{seed}_{number}", rng)
    graph = _graph(rng)
    ways = ("everything",) if _seems_batched(graph) else ("everything", "inputs", "outputs", "neither", "no file")
    way = ways[min(max(rng.integers(-2, 5), 0), len(ways) - 1)]
    inputs = [_tensor(each, optional=each.name in graph.defaults) for each in graph.inputs]
    outputs = [replace(_tensor(each.output), exact=each.exact) for each in graph.made]
    if way in ("everything", "inputs"):
        inputs = [_reshaped(each, graph.batch, rng) for each in _narrowed(inputs, rng)]
    else:  # only inputs that must be given are filled in
        inputs = [each for each in inputs if not each.optional]
    if way in ("everything", "outputs"):
        outputs = [_reshaped(each, graph.batch, rng) for each in outputs]
    asked = int(rng.integers(1, MOST_BATCH + 1)) * graph.batch
    if way == "no file" or (way != "everything" and rng.random() < 0.5):
        asked = 0
    config = None if way == "no file" else _config(rng, way, asked, graph, (inputs, outputs))
    most = asked or FILLED_IN * graph.batch
    return Model(f"m{seed}_{number}", _file(graph), config, most, tuple(inputs), tuple(outputs))


def _ragged(name: str, rng: Generator) -> Model:
    """A model of rows that are single elements, which is given the elements of all requests as if they were rows."""
    kind = ALL[rng.integers(len(ALL))]
    values = [Value(f"IN{at}", kind, ()) for at in range(rng.integers(1, 3))]
    graph = _Graph(1, values, {}, [])
    for _ in range(rng.integers(1, 3)):
        made = _output([kind], Site(values, 1, f"OUT{len(graph.made)}", rng))
        while len(made.output.dims) > 1 or not all(isinstance(dim, int) for dim in made.output.dims):
            made = _output([kind], Site(values, 1, f"OUT{len(graph.made)}", rng))
        graph.made.append(made)
    symbols = tuple(f"r{at}" for at in range(rng.integers(1, MOST_DIMS - 1)))
    dims = (-1,) * len(symbols)
    inputs = [Tensor(each.name, each.datatype, dims, dims, symbols, like=each.name) for each in values]
    outputs = []
    for each in graph.made:
        added = tuple(dim for dim in each.output.dims if isinstance(dim, int))
        shape = (*dims, *added)
        like = inputs[rng.integers(len(inputs))].name
        outputs.append(
            Tensor(each.output.name, each.output.datatype, shape, added, symbols, exact=each.exact, like=like)
        )
    most = int(rng.integers(2, MOST_BATCH + 1))
    parts = [f"max_batch_size: {most}\n", _SCHEDULERS[rng.integers(1, len(_SCHEDULERS))]]
    parts += [
        f'{field} {{ name: "{each.name}" data_type: TYPE_{each.datatype.replace("BYTES", "STRING")} dims: {list(each.dims)}'
        f"{' allow_ragged_batch: true' if field == 'input' else ''} }}\n"
        for field, tensors in (("input", inputs), ("output", outputs))
        for each in tensors
    ]
    parts += [f'batch_output {{ target_name: "{each.name}" source_input: "{each.like}" }}\n' for each in outputs]
    return Model(name, _file(graph), "".join(parts), most, tuple(inputs), tuple(outputs))


def _told(name: str, rng: Generator) -> Model:
    """A model that is told which elements are whose."""
    most = int(rng.integers(2, MOST_BATCH + 1))
    made = ragged.make(rng, most)
    symbols = tuple(f"d{place}" for place in range(made.dims.count(-1)))
    inputs = (
        Tensor(ragged.SOURCE, made.datatype, made.dims, made.dims, symbols, like=ragged.SOURCE),
        Tensor(ragged.ROW, "FP32", (2,), (2,)),
    )
    outputs = tuple(Tensor(each.name, each.datatype, each.dims, each.inner, like=each.like) for each in made.outputs)
    return Model(name, made.file, made.config, most, inputs, outputs, tuple(made.told), made.empty)


_RAGGED = {4: _told, 9: _ragged}  # of ten models which ones


def _graph(rng: Generator) -> _Graph:
    graph = _Graph(int(rng.random() < 0.6), [], {}, [])
    pattern = _NAMES[rng.integers(len(_NAMES))]
    kinds = [ALL[place] for place in rng.integers(len(ALL), size=rng.integers(1, 3))]
    if "BYTES" in kinds and "BF16" in kinds:  # which ONNX Runtime's Python interface cannot pass together
        kinds = ["BYTES"]
    for group, kind in enumerate(kinds):
        dims = _dims(rng, f"g{group}", MOST_DIMS - graph.batch)
        values = [Value(pattern.format(len(graph.inputs) + at), kind, dims) for at in range(rng.integers(1, 3))]
        graph.inputs += values
        for _ in range(rng.integers(1, 3)):
            graph.made.append(_output(kinds, Site(values, graph.batch, f"OUT{len(graph.made)}", rng)))
        if kind in NUMBERS and rng.random() < 0.3:
            _add_optional(graph, values[0], f"maybe {group}", rng)
    return graph


def _output(kinds: Sequence[str], site: Site) -> Made:
    while True:
        made = choose(site)
        if not ("BYTES" in kinds and made.output.datatype == "BF16"):
            return made


def _add_optional(graph: _Graph, value: Value, name: str, rng: Generator) -> None:
    """An input with ones for a default, which are added to the input `value`."""
    default = tuple([1] * graph.batch + [dim if isinstance(dim, int) else 1 for dim in value.dims])
    graph.inputs.append(Value(name, value.datatype, value.dims))
    graph.defaults[name] = default
    output = f"OUT{len(graph.made)}"
    kind = "BitwiseXor" if value.datatype in INTEGERS and rng.random() < 0.5 else "Add"
    node = helper.make_node(kind, [value.name, name], [output])
    graph.made.append(Made(Value(output, value.datatype, value.dims), [node]))


def _dims(rng: Generator, group: str, most: int) -> tuple[Dim, ...]:
    rank = int(rng.integers(0, most + 1))
    sizes: list[Dim] = [int(size) for size in rng.integers(1, 5, size=rank)]
    return tuple(f"{group}d{at}" if rng.random() < 0.35 else size for at, size in enumerate(sizes))


def _seems_batched(graph: _Graph) -> bool:
    """Whether what is filled in would be a batch that the model does not have."""
    values = [each for each in graph.inputs if each.name not in graph.defaults] + [each.output for each in graph.made]
    return not graph.batch and all(each.dims and not isinstance(each.dims[0], int) for each in values)


def _file(graph: _Graph) -> bytes:
    starts = [
        helper.make_tensor(name, TYPES[value.datatype], shape, [1] * math.prod(shape))
        for value in graph.inputs
        for name, shape in graph.defaults.items()
        if name == value.name
    ]
    made = helper.make_graph(
        [node for each in graph.made for node in each.nodes],
        "fuzz",
        [tensor_info(each, graph.batch) for each in graph.inputs],
        [tensor_info(each.output, graph.batch) for each in graph.made],
        [*starts, *(constant for each in graph.made for constant in each.constants)],
    )
    return bytes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )


def _tensor(value: Value, *, optional: bool = False) -> Tensor:
    inner = tuple(dim if isinstance(dim, int) else -1 for dim in value.dims)
    symbols = tuple(dim or "" for dim in value.dims if not isinstance(dim, int))
    return Tensor(value.name, value.datatype, inner or (1,), inner, symbols, optional)


def _narrowed(inputs: list[Tensor], rng: Generator) -> list[Tensor]:
    """Sometimes the configuration fixes a dimension that the model leaves open."""
    symbols = sorted({symbol for each in inputs for symbol in each.symbols})
    if not symbols or rng.random() < 0.7:
        return inputs
    symbol, size = symbols[rng.integers(len(symbols))], int(rng.integers(1, 5))
    return [_fixed(each, symbol, size) for each in inputs]


def _fixed(tensor: Tensor, symbol: str, size: int) -> Tensor:
    names = iter(tensor.symbols)
    inner = tuple(size if dim == -1 and next(names) == symbol else dim for dim in tensor.inner)
    left = tuple(each for each in tensor.symbols if each != symbol)
    return replace(tensor, dims=inner or (1,), inner=inner, symbols=left)


def _reshaped(tensor: Tensor, batch: int, rng: Generator) -> Tensor:
    """Sometimes clients see other dimensions than the model, with as many elements between any two open ones."""
    if rng.random() < 0.6 or not (tensor.inner or batch):
        return tensor
    dims: list[int] = []
    segment: list[int] = []
    for dim in (*tensor.inner, -1):
        if dim != -1:
            segment.append(dim)
            continue
        dims += [*_arranged(segment, rng), -1]
        segment = []
    dims.pop()
    return replace(tensor, dims=tuple(dims) or (1,)) if len(dims) + batch <= MOST_DIMS else tensor


def _arranged(segment: Sequence[int], rng: Generator) -> list[int]:
    size = math.prod(segment)
    choices = [list(segment), list(reversed(segment)), [size], [1, size], [size, 1]]
    return choices[rng.integers(len(choices))] if size > 1 else [1] * int(rng.integers(3))


def _config(rng: Generator, way: str, asked: int, graph: _Graph, tensors: tuple[list[Tensor], list[Tensor]]) -> str:
    heads = ('backend: "onnxruntime"\n', 'platform: "onnxruntime_onnx"\n', "")
    parts = [heads[rng.integers(len(heads))]]
    if asked or rng.random() < 0.5:
        parts.append(f"max_batch_size: {asked}\n")
    if way in ("everything", "inputs"):
        parts += _listed("input", tensors[0], graph.batch)
    if way in ("everything", "outputs"):
        parts += _listed("output", tensors[1], graph.batch)
    if asked:
        parts.append(_SCHEDULERS[rng.integers(len(_SCHEDULERS))])
    if rng.random() < 0.7:
        parts.append(f"instance_group {{ kind: KIND_CPU count: {rng.integers(1, 3)} }}\n")
    return "".join(parts)


def _listed(kind: str, tensors: Iterable[Tensor], batch: int) -> list[str]:
    return [
        f"{kind} {{ name: {json.dumps(each.name, ensure_ascii=False)} data_type: TYPE_{each.datatype.replace('BYTES', 'STRING')} dims: {list(each.dims)}"
        + (f" reshape {{ shape: {list(each.inner)} }}" if each.dims != each.inner and (batch or each.inner) else "")
        + (" optional: true" if each.optional else "")
        + " }\n"
        for each in tensors
    ]
