"""Python models in this very process: written to a folder, loaded, and asked without a child in between."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines.base import EngineSpec
from gateway.engines.measures import Measure, Measures, Owner
from gateway.engines.python.model import PythonModel, load
from gateway.scheduling.batch import stack
from gateway.types import Answer, Batch, DataType, InferRequest, InferResponse, Tensor

_versions = itertools.count(1001)  # each is a package of its own, and this process keeps what it has imported

CONFIG = """
backend: "python" max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: [ 2 ] }
output { name: "OUT" data_type: TYPE_FP32 dims: [ 2 ] }
"""
HEAD = """
import triton_python_backend_utils as pb_utils
import numpy as np
"""


def code(body: str) -> str:
    """A model.py with these methods, or with these classes."""
    if body.startswith("class "):
        return HEAD + body
    return HEAD + "class TritonPythonModel:\n" + textwrap.indent(textwrap.dedent(body), "    ")


def write(folder: Path, body: str, config: str = CONFIG, version: str = "1") -> Path:
    """A model's folder with a model.py of these methods."""
    path = folder / version
    path.mkdir(parents=True)
    (path / "model.py").write_text(code(body))
    (folder / "config.pbtxt").write_text(config)
    return path


class FakeChannel:
    """The gateway, as far as a model's code can see: `models` by name."""

    def __init__(self, models: dict[str, Callable[[InferRequest], Iterator[InferResponse]]] | None = None) -> None:
        self.models = models or {}
        self.asked: list[InferRequest] = []
        self.gone: set[str] = set()
        self.measures = Measures()
        self.owner = Owner(self.measures)

    def infer(self, request: InferRequest) -> Iterator[InferResponse]:
        self.asked.append(request)
        return self.models[request.model_name](request)

    def measure(self, measure: Measure, *, wait: bool = True) -> float:
        value = self.owner.act(measure)
        return value if wait else 0.0

    def cancelled(self, request: InferRequest) -> bool:
        return request.id in self.gone


def loaded(
    folder: Path, body: str, config: str = CONFIG, *, channel: FakeChannel | None = None, count: int = 1
) -> list[PythonModel]:
    """Instances of a model with these methods."""
    version = str(next(_versions))
    path = write(folder / "m", body, config, version)
    proto = parse_text(Source("config.pbtxt", config))
    proto.name, proto.default_model_filename = "m", "model.py"
    spec = EngineSpec(build(proto, Source("config.pbtxt")), version, path, "cpu", channel=channel or FakeChannel())
    return load(spec, count)


def ask(model: PythonModel, *requests: InferRequest) -> list[list[Answer]]:
    """The answers to each of these requests, run as one batch."""
    batch = Batch(sum(each.rows for each in requests), dict, requests=requests)
    answers: list[list[Answer]] = [[] for _ in requests]
    for given in model.answer(stack(requests, model._config), batch):
        for answer in given:
            answers[answer.request].append(answer)
    return answers


def one(model: PythonModel, *requests: InferRequest) -> list[Answer]:
    """The one answer to each."""
    found = ask(model, *requests)
    assert all(len(each) == 1 and each[0].final for each in found)
    return [each[0] for each in found]


def texts(values: Sequence[bytes], shape: tuple[int, ...] | None = None) -> Tensor:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return Tensor.from_array(DataType.BYTES, array.reshape(shape or (1, len(values))))
