"""Plays random models against a gateway: load, ask alone and together, ask wrongly, unload."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format, text_format
from numpy.random import Generator
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from loadtest.fuzz import malformed, models, requests
from loadtest.fuzz.models import Model
from loadtest.fuzz.requests import Array, Request, difference
from loadtest.fuzz.wires import WIRES, Failed, Wires

TOGETHER = 16  # requests at a time, at most
WRONG_EVERY = 4  # good requests to a malformed one


@dataclass(frozen=True, slots=True)
class Ask:
    """A good request, its wire, the answer that is due, None where ONNX Runtime refuses, and a seed for what is left to chance."""

    request: Request
    wire: str
    want: Mapping[str, Array] | None
    seed: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that the gateway did otherwise than it should have."""

    model: Model
    wire: str
    text: str
    request: Request | None = None
    alone: str = ""  # what came of the same request by itself, in its smallest form that still fails


@dataclass(slots=True)
class Tally:
    """What was sent and what came of it. `batches` and `rows` are what the gateway says that it ran."""

    models: int = 0
    requests: int = 0
    wires: Counter[str] = field(default_factory=Counter)
    datatypes: Counter[str] = field(default_factory=Counter)
    ranks: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    refused: int = 0  # by ONNX Runtime and by the gateway alike
    rows: int = 0
    batches: int = 0
    shared: int = 0  # good requests that were not alone in their batch, at the least
    failing: set[str] = field(default_factory=set)  # models of which batches have to fail
    faults: list[Fault] = field(default_factory=list)


class Session:
    """One gateway and the models that were tried on it, in a repository that is its own."""

    def __init__(self, wires: Wires, repository: Path) -> None:
        self.tally = Tally()
        self._wires = wires
        self._repository = repository

    async def play(self, seed: int, number: int, count: int) -> None:
        """Load the model of this number, send it so many requests, and unload it."""
        model = models.make(seed, number)
        rng = np.random.default_rng([seed, number, 1])
        folder = self._repository / model.name
        try:
            await self._load(model, folder, sent=rng.random() < 0.2)
        except InferenceServerException as error:
            self._fault(model, "load", error.message())
            return
        await self._check_metadata(model)
        await self._requests(model, rng, count)
        await self._read_statistics(model)
        await self._wires.http.unload_model(model.name)
        shutil.rmtree(folder)

    async def _load(self, model: Model, folder: Path, *, sent: bool) -> None:
        """From the repository, with a configuration that lies there or is `sent` with the call."""
        self._count(model)
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.onnx").write_bytes(model.file)
        if sent and model.config is not None:
            self.tally.features["config sent with the load"] += 1
            config = json_format.MessageToJson(text_format.Parse(model.config, model_config_pb2.ModelConfig()))
            await self._wires.http.load_model(model.name, config=config)
            return
        if model.config is not None:
            (folder / "config.pbtxt").write_text(model.config, encoding="utf-8")
        await self._wires.http.load_model(model.name)

    def _count(self, model: Model) -> None:
        tally = self.tally
        tally.models += 1
        tally.datatypes.update(each.datatype for each in (*model.inputs, *model.outputs))
        tally.ranks.update(str(len(each.inner)) for each in model.inputs)
        text = model.config or ""
        features = {
            "no config.pbtxt": model.config is None,
            "inputs filled in": "input {" not in text,
            "outputs filled in": "output {" not in text,
            "batched": model.batch,
            "open dimensions": any(-1 in each.dims for each in model.inputs),
            "reshape": "reshape" in text,
            "optional inputs": "optional" in text,
            "ragged": model.ragged,
            "batch_input": model.told,
            "dynamic_batching": "dynamic_batching" in text,
            "results compared to 1e-5": not all(each.exact for each in model.outputs),
        }
        tally.features.update(name for name, has in features.items() if has)

    async def _check_metadata(self, model: Model) -> None:
        """Names, types and shapes as they follow from configuration and file, on both wires."""
        over_http = await self._wires.http.get_model_metadata(model.name)
        over_grpc = await self._wires.grpc.get_model_metadata(model.name, as_json=True)
        for kind, tensors in (("inputs", model.inputs), ("outputs", model.outputs)):
            want = sorted((each.name, each.datatype, [-1] * model.batch + list(each.dims)) for each in tensors)
            for wire, told in (("http", over_http), ("grpc", over_grpc)):
                got = sorted(
                    (each["name"], each["datatype"], [int(dim) for dim in each["shape"]]) for each in told[kind]
                )
                if got != want:
                    self._fault(model, f"{wire} metadata", f"{kind} {got}, not {want}")

    async def _requests(self, model: Model, rng: Generator, count: int) -> None:
        reference = requests.Reference(model)
        while count > 0:
            size = min(count, int(rng.choice([1, 2, TOGETHER, TOGETHER])))
            # Requests of the same shapes, which can share a batch, and others among them.
            sizes = requests.sizes_of(model, rng)
            other = 1.0 if model.ragged else 0.2
            asks = [
                self._ask_of(reference, model, requests.sizes_of(model, rng) if rng.random() < other else sizes, rng)
                for _ in range(size)
            ]
            wrong = malformed.make(model, rng, reference.answer) if rng.random() < size / WRONG_EVERY else []
            async with asyncio.TaskGroup() as group:  # all is made, so that they come together
                for ask in asks:
                    group.create_task(self._ask(reference, model, ask))
                for each in wrong:
                    group.create_task(self._ask_wrongly(model, each))
            count -= size

    def _ask_of(self, reference: requests.Reference, model: Model, sizes: Mapping[str, int], rng: Generator) -> Ask:
        request = requests.make(model, rng, sizes)
        return Ask(request, WIRES[rng.integers(len(WIRES))], reference.answer(request), int(rng.integers(1 << 30)))

    async def _ask(self, reference: requests.Reference, model: Model, ask: Ask) -> None:
        self.tally.requests += 1
        self.tally.wires[ask.wire] += 1
        if ask.want is None:
            self.tally.refused += 1
            self.tally.failing.add(model.name)
        text = await self._trouble(model, ask)
        if text:
            self._fault(model, ask.wire, text, ask.request, await self._smallest(reference, model, ask))

    async def _trouble(self, model: Model, ask: Ask) -> str:
        """What is wrong with the answer; empty if nothing is."""
        rng = np.random.default_rng(ask.seed)
        try:
            got = await self._wires.send(ask.wire, model, ask.request, ask.want or {}, rng)
        except Failed as error:
            due = ask.want is None and error.status in (400, 500, "INVALID_ARGUMENT", "INTERNAL")
            return "" if due else f"answered {error}"
        except Exception as error:  # noqa: BLE001 - whatever a client chokes on is a fault of the answer
            return f"{type(error).__name__}: {error}"
        if ask.want is None:
            return f"answered {list(got)}, where ONNX Runtime refuses"
        return _compared(model, ask.want, got)

    async def _smallest(self, reference: requests.Reference, model: Model, ask: Ask) -> str:
        """What comes of the request by itself, of its first row, and on other wires."""
        tries = [("alone", ask)]
        if model.batch:
            first = Request({name: array[:1] for name, array in ask.request.inputs.items()}, ask.request.outputs)
            tries.append(("its first row alone", replace(ask, request=first, want=reference.answer(first))))
        tries += [(f"alone by {other}", replace(ask, wire=other)) for other in WIRES if other != ask.wire]
        return "; ".join([f"{label}: {await self._trouble(model, each) or 'right'}" for label, each in tries])

    async def _ask_wrongly(self, model: Model, wrong: malformed.Wrong) -> None:
        self.tally.requests += 1
        self.tally.wrong[f"{wrong.wire}: {wrong.kind}"] += 1
        if wrong.runs:
            self.tally.failing.add(model.name)
        try:
            got: Any = await wrong.send(self._wires)
            told = f"answered {list(got)}"
            right = wrong.kind == malformed.GARBLED  # it may still be a good request, or a good one of another kind
        except Failed as error:
            told, right = f"answered {error}", wrong.fits(error.status, error.text)
        except Exception as error:  # noqa: BLE001 - as above
            told, right = f"{type(error).__name__}: {error}", False
        if not right:
            due = wrong.due
            self._fault(model, f"{wrong.wire}, {wrong.kind}", f"{told}\n  not {due.http}, {due.grpc}: {due.text}")

    async def _read_statistics(self, model: Model) -> None:
        told = (await self._wires.http.get_inference_statistics(model.name))["model_stats"][0]
        self.tally.rows += told["inference_count"]
        self.tally.batches += told["execution_count"]
        self.tally.shared += max(0, told["inference_stats"]["success"]["count"] - told["execution_count"])

    def _fault(self, model: Model, wire: str, text: str, request: Request | None = None, alone: str = "") -> None:
        self.tally.faults.append(Fault(model, wire, text, request, alone))


def _compared(model: Model, want: Mapping[str, Array], got: Any) -> str:
    if got.keys() != want.keys():
        return f"outputs {list(got)}, not {list(want)}"
    for tensor in model.outputs:
        if tensor.name not in want:
            continue
        datatype, array = got[tensor.name]
        text = f"it is {datatype}" if datatype != tensor.datatype else ""
        text = text or difference(want[tensor.name], _as_bytes(array), datatype, exact=tensor.exact)
        if text:
            return f"output '{tensor.name}': {text}"
    return ""


def _as_bytes(array: Array) -> Array:
    if array.dtype != object:
        return array
    made = np.empty(array.size, object)
    made[:] = [each.encode() if isinstance(each, str) else bytes(each) for each in array.reshape(-1)]
    return made.reshape(array.shape)
