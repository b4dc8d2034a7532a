"""What a child process does: takes in instances, and for each one loads its model and runs its batches on a thread.

The main thread waits on the child's own line: for instances to take in and for heartbeats, which go unanswered when a
model keeps the interpreter to itself. When the line closes the child ends. An instance ends when its own line does.
"""

from __future__ import annotations

import builtins
import importlib
import logging
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from gateway import errors
from gateway.engines.base import EngineCrashed, EngineSpec
from gateway.engines.isolated import limits
from gateway.engines.isolated.area import NOWHERE, Area, beside
from gateway.engines.isolated.calls import ChildCalls
from gateway.engines.isolated.frames import (
    About,
    Answered,
    Beat,
    Done,
    Failed,
    Finished,
    Frame,
    Host,
    Load,
    Message,
    Ready,
    Run,
    ToChild,
    encode,
)
from gateway.engines.isolated.layout import Layout, lay_out, read, read_form
from gateway.engines.isolated.line import ChildLine
from gateway.message import pack_error
from gateway.telemetry import log_event
from gateway.types import Answer, Array, Batch, InferRequest, RequestedOutput

_PACKET = 1 << 16
_MOST_DESCRIPTORS = 5
_DEVICE_LOST = 75  # exit status: sysexits.h has it for what may go well the next time
_decode_packet = msgspec.msgpack.Decoder(Host | Beat).decode
_decode = msgspec.msgpack.Decoder(ToChild).decode


def live(home: socket.socket) -> int:
    """Serve until the line closes; returns the exit status."""
    with suppress(ConnectionError):  # it may close while a beat is on its way there or back
        while True:
            packet, descriptors, _, _ = socket.recv_fds(home, _PACKET, _MOST_DESCRIPTORS)
            if not packet:
                break
            message = _decode_packet(packet)
            if isinstance(message, Beat):
                home.send(encode(message))
                continue
            instance = Instance(message, descriptors)
            threading.Thread(target=instance.serve, name=message.name, daemon=True).start()
    return 0


class Instance:
    """One instance in this process, on its thread from the load to the end."""

    def __init__(self, host: Host, descriptors: Sequence[int]) -> None:
        rest = list(descriptors)
        self._line = ChildLine(socket.socket(fileno=rest.pop(0)))
        self._inputs = Area(rest.pop(0)) if host.areas else None
        self._outputs = Area(rest.pop(0)) if host.areas else None
        self._calls: ChildCalls | None = None
        if host.calls:
            line = socket.socket(fileno=rest.pop(0))
            self._calls = ChildCalls(line, Area(rest.pop(0)) if host.areas else None)
        self._model: Any = None  # `Loaded` or `Answering`
        self._desk = 0  # of the run under way
        self._given = [NOWHERE, NOWHERE]  # where the outputs of the last run of each desk lie

    def serve(self) -> None:
        """Load, then run what comes until the line closes."""
        while (frame := self._line.receive()) is not None:
            message = _decode(frame.header)
            if isinstance(message, Load):
                self._attempt(partial(self._load, message, frame))
            elif isinstance(message, Run):
                self._attempt(partial(self._run, message, frame))
        if (close := getattr(self._model, "close", None)) is not None:
            self._attempt(close)
        self._model = None
        self._line.close()
        for area in (self._inputs, self._outputs):
            if area is not None:
                area.close()

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except errors.GatewayError as error:
            self._line.send(Failed(pack_error(error)))
        except EngineCrashed as problem:  # its device works again in a new process, and in no other way
            log_event("device_lost", logging.ERROR, reason=str(problem))
            os._exit(_DEVICE_LOST)
        except BaseException as problem:  # noqa: BLE001 - a model may raise anything, and the gateway must hear of it
            self._line.send(_told(problem))

    def _load(self, message: Load, frame: Frame) -> None:
        spec: EngineSpec = pickle.loads(frame.payload)  # noqa: S301 - from the gateway, which started us
        config = replace(spec.config, proto=ModelConfig.FromString(message.proto))
        limits.apply(config)
        try:
            backend = importlib.import_module(message.module)
        except ImportError as missing:
            raise errors.Unavailable(
                f"backend '{spec.config.backend}' needs the package '{missing.name}', which is missing or broken; "
                f"{message.install}"
            ) from missing
        (self._model,) = backend.load(replace(spec, config=config, channel=self._calls), 1)
        model = self._model
        self._line.send(Ready(model.provider, model.warnings, model.widest, hasattr(model, "answer")))

    def _run(self, message: Run, frame: Frame) -> None:
        answers = hasattr(self._model, "answer")
        layout = read_form(message.form)
        inputs = self._read(message, frame, layout, copy=answers)
        requests = [_request(about) for about in message.requests]
        batch = Batch(message.rows, lambda: inputs, message.outputs, message.cores, requests=requests)
        if not answers:
            outputs = self._model.compute(inputs, batch)
            finished = time.monotonic_ns()
            self._give(outputs, lambda form, start: Done(finished, form, start))
            return
        if self._calls is not None:
            self._calls.begin(requests)
        for given in self._model.answer(inputs, batch):
            self._answer(given)
            if self._line.receive() is None:
                return
        self._line.send(Finished(time.monotonic_ns()))

    def _answer(self, given: Sequence[Answer]) -> None:
        arrays = {
            f"{place}/{name}": array
            for place, answer in enumerate(given)
            for name, array in (answer.outputs or {}).items()
        }
        answers = tuple(
            (
                answer.request,
                None if answer.outputs is None else tuple(answer.outputs),
                b"" if answer.error is None else pack_error(answer.error),
                answer.final,
                None if answer.parameters is None else dict(answer.parameters),
            )
            for answer in given
        )
        finished = time.monotonic_ns()
        self._give(arrays, lambda form, start: Answered(finished, form, start, answers))

    def _read(self, message: Run, frame: Frame, layout: Layout, *, copy: bool) -> dict[str, Array]:
        """The inputs of a run, as a view where that does."""
        self._desk = message.desk
        if self._inputs is None or frame.payload or not layout.size:
            return read(frame.payload or bytearray(1), layout, copy=copy)
        block = self._inputs.seen(message.start + layout.size)
        return read(memoryview(block)[message.start :], layout, copy=copy)

    def _give(self, arrays: dict[str, Array], message: Callable[[bytes, int], Message]) -> None:
        layout, values = lay_out(arrays)
        # Who asked for the run before this one may not have taken in yet what that gave.
        self._given[self._desk] = span = beside(layout.size, self._given[1 - self._desk])
        self._line.give(message(layout.form, span[0]), layout, values, self._outputs, span)


def _request(about: About) -> InferRequest:
    outputs = tuple(RequestedOutput(*output) for output in about.outputs)
    return InferRequest(
        about.model,
        {},
        about.version,
        about.id,
        outputs,
        about.parameters,
        about.deadline,
        about.priority,
        about.tenant,
        rows=about.rows,
    )


def _told(problem: BaseException) -> Failed:
    """What is no error of ours, by the nearest of its classes that every Python has."""
    kind = next(each.__name__ for each in type(problem).__mro__ if getattr(builtins, each.__name__, None) is each)
    text = str(problem) if type(problem).__name__ == kind else f"{type(problem).__name__}: {problem}"
    return Failed(b"", kind, text, "".join(traceback.format_exception(problem)))
