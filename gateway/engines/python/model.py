"""A Triton `model.py` while it is loaded: finds its `TritonPythonModel`, hands it batches, and takes its answers.

Runs the model's code on the threads of the process it is in, which is a child that has nothing else to lose. What that
code raises, forgets or gives wrongly is answered to the requests it concerns; its traceback goes to the log.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gateway import errors
from gateway.config.parse import config_json
from gateway.config.ragged import shapes_of
from gateway.engines.base import EngineSpec
from gateway.engines.channel import Channel
from gateway.engines.python import utilities
from gateway.engines.python.errors import TritonModelException
from gateway.engines.python.requests import InferenceRequest
from gateway.engines.python.responses import InferenceResponse, InferenceResponseSender, Run
from gateway.engines.python.tensors import Tensor
from gateway.telemetry import log_event
from gateway.types import Answer, Array, Batch, InferRequest, InferResponse

_KINDS = {"cpu": "CPU", "gpu": "GPU"}
_PATH = re.compile(r"(?<![\w.])(?:/[\w.@+-]+){2,}/?")


def load(spec: EngineSpec, count: int) -> list[PythonModel]:
    """Import the model's code and call its `initialize`, `count` times. Raises `Unavailable` saying what went wrong."""
    config = spec.config
    if spec.channel is None:
        raise errors.Unavailable(
            f"model '{config.name}' is code, which runs in a child process only, and this gateway has none. Serve it on Linux"
        )
    if "EXECUTION_ENV_PATH" in config.parameters:
        raise errors.Unsupported(
            f"model '{config.name}' asks for an execution environment of its own (EXECUTION_ENV_PATH), which this server "
            "cannot unpack. Install its packages where the gateway is installed, and remove the parameter from config.pbtxt"
        )
    return [PythonModel(spec, spec.channel, index) for index in range(count)]


class _Misused(Exception):
    """What `execute` returned is none of what it may."""


class PythonModel:
    """One instance: `Answering`."""

    provider = "Python"
    warnings: tuple[str, ...] = ()
    widest = 1

    def __init__(self, spec: EngineSpec, channel: Channel, index: int) -> None:
        self._config = spec.config
        self._name = _instance(spec, index)
        self._channel = channel
        self._running = False
        self._run: Run | None = None
        self._decoupled = spec.config.decoupled
        self._ragged = [tensor.name for tensor in spec.config.inputs if tensor.ragged]
        self._outputs = {tensor.name: tensor.datatype for tensor in spec.config.outputs}
        self._executor = ThreadPoolExecutor(1, f"execute-{spec.config.name}") if self._decoupled else None
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            utilities.install(spec.config.name, spec.path, self._infer, channel.measure)
            kind = import_model(spec.path, spec.config.default_model_filename)
            self._model = kind()
            if hasattr(self._model, "initialize"):
                self._model.initialize(arguments(spec, index))
        except Exception as problem:  # the model's code may raise anything, which the operator must hear of
            raise errors.Unavailable(f"model '{spec.config.name}' does not load: {_plain(problem)}") from problem
        if not hasattr(self._model, "execute"):
            raise errors.Unavailable(f"the TritonPythonModel of '{spec.config.name}' has no execute method; write one")

    def answer(self, inputs: dict[str, Array], batch: Batch) -> Iterator[Sequence[Answer]]:
        """See `Answering.answer`."""
        if not batch.requests:
            return  # nobody sent it: code is not run on what nobody asked
        run = self._run = Run(len(batch.requests))
        self._running = True
        try:
            if self._executor is None:
                self._execute(run, self._received(run, inputs, batch))
            else:
                # Beside this thread, so that its answers leave while it works on the next.
                self._executor.submit(self._execute, run, self._received(run, inputs, batch))
            yield from run.answers()
        finally:
            self._running = False

    def interrupt(self) -> None:
        """See `Loaded.interrupt`: nobody waits for what the model's code may still do."""
        if self._run is not None:
            self._run.fail_rest(errors.stopping())

    def close(self) -> None:
        """See `Answering.close`."""
        if hasattr(self._model, "finalize"):
            try:
                self._model.finalize()
            except Exception as problem:  # noqa: BLE001 - the model's code may raise anything, and is done with anyway
                log_event("model_finalize_failed", logging.ERROR, problem, model=self._config.name)

    # --- a batch

    def _received(self, run: Run, inputs: dict[str, Array], batch: Batch) -> list[InferenceRequest]:
        """The requests of a batch, each with its rows."""
        datatypes = {tensor.name: tensor.datatype for tensor in self._config.inputs}
        apart = {name: _apart(inputs.pop(name), inputs.pop(shapes_of(name))) for name in self._ragged if name in inputs}
        received, at = [], 0
        for index, request in enumerate(batch.requests):
            rows = slice(at, at + request.rows) if self._config.max_batch_size else slice(None)
            at += request.rows
            names = [output.name for output in request.outputs] or list(self._outputs)
            wanted = {name: self._outputs[name] for name in names}
            cancelled = partial(self._channel.cancelled, request)
            sender = InferenceResponseSender(run, index, wanted, decoupled=self._decoupled, cancelled=cancelled)
            tensors = [
                Tensor.from_gateway(name, datatypes[name], array[rows] if self._config.max_batch_size else array)
                for name, array in inputs.items()
            ]
            tensors += [Tensor.from_gateway(name, datatypes[name], arrays[index]) for name, arrays in apart.items()]
            received.append(InferenceRequest.received(request, tensors, names, sender))
        return received

    def _execute(self, run: Run, requests: list[InferenceRequest]) -> None:
        """Call the model's `execute` and take what it returns. The list is emptied, so that the model's are the last."""
        try:
            returned = self._model.execute(list(requests))
            if inspect.iscoroutine(returned):
                returned = asyncio.run_coroutine_threadsafe(returned, self._event_loop()).result()
            if returned is not None:
                self._take(run, requests, returned)
        except Exception as problem:  # noqa: BLE001 - the model's code may raise anything; its clients must hear of it
            log_event("model_execute_failed", logging.ERROR, problem, model=self._config.name)
            for each in requests:
                each.get_response_sender().close()
            run.fail_rest(
                errors.Internal(
                    f"Failed to process the request(s) for model instance '{self._name}', message: {_plain(problem)}"
                )
            )
            problem.__traceback__ = None  # its frames hold the requests
        requests.clear()

    def _take(self, run: Run, requests: Sequence[InferenceRequest], returned: object) -> None:
        """The answers of a list of responses, one for each request."""
        if self._decoupled:
            raise _Misused(
                f"Python model '{self._name}' is using the decoupled mode and the execute function must return None."
            )
        if not isinstance(returned, list):
            raise _Misused(f"Expected a list in the execute return, found type '{type(returned)}'.")
        if len(returned) != len(requests):
            raise _Misused(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(requests)}, and InferenceResponse(s) size is:{len(returned)}"
            )
        for response in returned:
            if response is not None and not isinstance(response, InferenceResponse):
                raise _Misused(
                    "Expected an 'InferenceResponse' object in the execute function return list, found type "
                    f"'{type(response)}'."
                )
        answers = [
            each.get_response_sender().returned(response)
            for each, response in zip(requests, returned, strict=True)
            if response is not None
        ]
        run.give(answers, [answer.request for answer in answers])

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that coroutines of the model run on, with a thread of its own."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="model-coroutines", daemon=True).start()
        return self._loop

    def _infer(self, request: InferRequest) -> Iterator[InferResponse]:
        if not self._running:
            raise TritonModelException("BLS is supported only during the 'execute' function.")
        return self._channel.infer(request)


def import_model(folder: Path, filename: str) -> Any:
    """The class `TritonPythonModel` of a version's file. It and what lies beside it can be imported as with Triton.

    Raises `TritonModelException` without such a class, and whatever the code raises.
    """
    # Files written into the folder would look like a changed model.
    sys.dont_write_bytecode = True
    for path in (str(folder.parent), str(folder)):
        if path not in sys.path:
            sys.path.append(path)
    # In a package named by the version, so that `from . import` works; and anew, because `pb_utils` is each model's own.
    for name in [name for name in sys.modules if name.partition(".")[0] == folder.name]:
        del sys.modules[name]
    package = sys.modules[folder.name] = ModuleType(folder.name)
    package.__path__ = [str(folder)]
    module = importlib.import_module(f"{folder.name}.{Path(filename).stem}")
    kind = getattr(module, "TritonPythonModel", None)
    if kind is None:
        raise TritonModelException(f"{filename} has no class TritonPythonModel; name the model's class so")
    return kind


def arguments(spec: EngineSpec, index: int) -> dict[str, str]:
    """What `initialize` is given."""
    kind, _, number = spec.device.partition(":")
    return {
        "model_config": json.dumps(config_json(spec.config.proto)),
        "model_instance_kind": _KINDS.get(kind, "CPU"),
        "model_instance_name": _instance(spec, index),
        "model_instance_device_id": number or "0",
        "model_repository": str(spec.path.parent),
        "model_version": spec.version,
        "model_name": spec.config.name,
    }


def _apart(array: Array, shapes: Array) -> list[Array]:
    """The elements of each request's ragged input, in its shape."""
    ends = np.cumsum(shapes.prod(axis=1))
    return [part.reshape(shape) for part, shape in zip(np.split(array, ends[:-1]), shapes, strict=True)]


def _plain(problem: BaseException) -> str:
    """What clients may read of an error: not where the files are."""
    kind = "" if isinstance(problem, _Misused) else f"{type(problem).__name__}: "
    return _PATH.sub("<path>", f"{kind}{problem}").strip()


def _instance(spec: EngineSpec, index: int) -> str:
    return f"{spec.config.name}_0_{index}"
