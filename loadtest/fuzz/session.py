"""Plays random models against a gateway: load, ask alone and together, ask wrongly, unload."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from tritonclient.utils import InferenceServerException

from loadtest.fuzz import malformed, models, requests
from loadtest.fuzz.models import Model
from loadtest.fuzz.requests import Array, Reference, Refused, Request, difference
from loadtest.fuzz.wires import WIRES, Failed, Wires

TOGETHER = 8  # requests at a time, at most
WRONG_EVERY = 4  # good requests to a malformed one


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
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.onnx").write_bytes(model.file)
        if model.config is not None:
            (folder / "config.pbtxt").write_text(model.config, encoding="utf-8")
        self._count(model)
        try:
            await self._wires.http.load_model(model.name)
        except InferenceServerException as error:
            self._fault(model, "load", error.message())
            return
        await self._check_metadata(model)
        await self._requests(model, rng, count)
        await self._read_statistics(model)
        await self._wires.http.unload_model(model.name)
        shutil.rmtree(folder)

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
        reference = Reference(model)
        while count > 0:
            size = min(count, int(rng.choice([1, 2, TOGETHER])))
            made = [requests.make(model, rng) for _ in range(size)]
            wires = [WIRES[place] for place in rng.integers(len(WIRES), size=size)]
            seeds = rng.integers(1 << 30, size=size)
            async with asyncio.TaskGroup() as group:
                for request, wire, seed in zip(made, wires, seeds, strict=True):
                    group.create_task(self._ask(reference, model, request, wire, int(seed)))
                if rng.random() < size / WRONG_EVERY:
                    for wrong in malformed.make(model, rng):
                        group.create_task(self._ask_wrongly(model, wrong))
            count -= size

    async def _ask(self, reference: Reference, model: Model, request: Request, wire: str, seed: int) -> None:
        self.tally.requests += 1
        self.tally.wires[wire] += 1
        text = await self._trouble(reference, model, request, wire, seed)
        if text:
            alone = await self._smallest(reference, model, request, wire)
            self._fault(model, wire, text, request, alone)

    async def _trouble(self, reference: Reference, model: Model, request: Request, wire: str, seed: int) -> str:
        """What is wrong with the answer; empty if nothing is."""
        try:
            want: dict[str, Array] | None = reference.answer(request)
        except Refused:
            want = None
        rng = np.random.default_rng(seed)
        try:
            got = await self._wires.send(wire, model, request, want or {}, rng)
        except Failed as error:
            if want is None and error.status in (400, 500, "INVALID_ARGUMENT", "INTERNAL"):
                self.tally.refused += 1
                return ""
            return f"answered {error}"
        except Exception as error:  # noqa: BLE001 - whatever a client chokes on is a fault of the answer
            return f"{type(error).__name__}: {error}"
        if want is None:
            return f"answered {list(got)}, where ONNX Runtime refuses"
        return _compared(model, want, got)

    async def _smallest(self, reference: Reference, model: Model, request: Request, wire: str) -> str:
        """What comes of the request by itself, and of its first row."""
        first = Request({name: array[:1] for name, array in request.inputs.items()}, request.outputs)
        tries = [("alone", request, wire)]
        if model.batch:
            tries.append(("its first row alone", first, wire))
        tries += [(f"alone by {other}", request, other) for other in WIRES if other != wire]
        told = [
            f"{label}: {await self._trouble(reference, model, each, way, 0) or 'right'}" for label, each, way in tries
        ]
        return "; ".join(told)

    async def _ask_wrongly(self, model: Model, wrong: malformed.Wrong) -> None:
        import re

        self.tally.requests += 1
        self.tally.wrong[f"{wrong.wire}: {wrong.kind}"] += 1
        status, pattern = wrong.expected()
        try:
            got: Any = await wrong.send(self._wires)
        except Failed as error:
            if error.status != status or re.fullmatch(pattern, error.text, re.DOTALL) is None:
                self._fault(model, f"{wrong.wire}, {wrong.kind}", f"answered {error}\n  not {status}: {pattern}")
            return
        except Exception as error:  # noqa: BLE001 - as above
            self._fault(model, f"{wrong.wire}, {wrong.kind}", f"{type(error).__name__}: {error}")
            return
        self._fault(model, f"{wrong.wire}, {wrong.kind}", f"answered {list(got)}, not {status}: {pattern}")

    async def _read_statistics(self, model: Model) -> None:
        told = (await self._wires.http.get_inference_statistics(model.name))["model_stats"][0]
        self.tally.rows += told["inference_count"]
        self.tally.batches += told["execution_count"]

    def _fault(self, model: Model, wire: str, text: str, request: Request | None = None, alone: str = "") -> None:
        self.tally.faults.append(Fault(model, wire, text, request, alone))


def _compared(model: Model, want: dict[str, Array], got: Any) -> str:
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
