"""Traces of single requests: when they began, waited, ran and ended, and if wanted what went in and came out.

A wrapper `Infer -> Infer`, and another for what models ask of others: the steps of ensembles, and calls that a model's code
makes for a request and says so. Those are parts of the trace, with traces of their own. What the timestamps say is taken from the timings of the last response, laid back to back
before it: the stages are as long as they were, and end when the answer was there. Times are `time.monotonic_ns`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from gateway.middleware.wire_times import WireTimes
from gateway.types import Infer, InferRequest, InferResponse, Responses, Tensor, Timings


@dataclass(slots=True)
class Trace:
    """One request that was traced. `inputs` and `outputs` are there where tensors are wanted."""

    number: int
    request: InferRequest
    started: int
    ended: int = 0
    version: str = ""
    timings: Timings | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: list[Mapping[str, Tensor]] = field(default_factory=list)
    error: str = ""  # the class of the error that it ended with
    parent: int = 0  # the number of the trace that this is a part of
    parts: list[Trace] = field(default_factory=list)
    composed: bool = False  # its parts did all that was done
    wire: Sequence[tuple[str, int]] = ()
    numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)
    tensors: bool = False  # whether they are wanted

    @property
    def family(self) -> Iterator[Trace]:
        """The trace and its parts."""
        yield self
        for part in self.parts:
            yield from part.family

    def timestamps(self, *, wanted: bool) -> list[tuple[str, int]]:
        """The stages by Triton's names, in their order; none, where they are not wanted."""
        if not wanted:
            return []
        stamps = [("REQUEST_START", self.started)]
        if self.composed:
            stamps.append(("QUEUE_START", self.started))
        elif (spent := self.timings) is not None:
            output = self.ended - spent.compute_output_ns
            infer = output - spent.compute_infer_ns
            compute = infer - spent.compute_input_ns
            stamps += [
                ("QUEUE_START", compute - spent.queue_ns),
                ("COMPUTE_START", compute),
                ("COMPUTE_INPUT_END", infer),
                ("COMPUTE_OUTPUT_START", output),
                ("COMPUTE_END", self.ended),
            ]
        before = [stamp for stamp in self.wire if stamp[1] <= self.started]
        after = self.wire[len(before) :]
        return [*before, *stamps, ("INFER_RESPONSE_COMPLETE", self.ended), ("REQUEST_END", self.ended), *after]


class Sampling(Protocol):
    """By which settings a request is traced."""

    @property
    def level(self) -> tuple[str, ...]:
        """TIMESTAMPS, TENSORS or both."""

    @property
    def log_frequency(self) -> int:
        """After how many traces they are written."""


class Sampler(Protocol):
    """Which requests are traced; `on` is false while none are."""

    on: bool

    def sample(self, model: str) -> Sampling | None:
        """By which settings to trace this request of a model; None not to."""


def tracing(infer: Infer, sampler: Sampler, keep: Callable[[Trace, Sampling], None]) -> Infer:
    """Wrap an endpoint so that the requests that `sampler` picks are told to `keep` once they are over."""
    numbers = itertools.count(1)

    def endpoint(request: InferRequest) -> Responses:
        if not sampler.on or (sampling := sampler.sample(request.model_name)) is None:
            return infer(request)
        return traced(request, sampling)

    async def traced(request: InferRequest, sampling: Sampling) -> AsyncGenerator[InferResponse, None]:
        trace = _begun(request, numbers, tensors="TENSORS" in sampling.level)
        wire = request.trace
        try:
            async with aclosing(_watched(infer, request, trace)) as responses:
                async for response in responses:
                    yield response
        finally:
            if isinstance(wire, WireTimes):
                trace.wire = wire.stamps
                wire.when_closed(partial(keep, trace, sampling))
            else:
                keep(trace, sampling)

    return endpoint


def tracing_parts(infer: Infer) -> Infer:
    """Wrap the endpoint that models ask for others, so that what they ask is a part of the trace of why they ask."""

    def endpoint(request: InferRequest) -> Responses:
        whole = request.trace
        return part(request, whole) if isinstance(whole, Trace) else infer(request)

    def part(request: InferRequest, whole: Trace) -> Responses:
        trace = _begun(request, whole.numbers, tensors=whole.tensors)
        trace.parent = whole.number
        whole.parts.append(trace)
        return _watched(infer, request, trace)

    return endpoint


def compose(request: InferRequest) -> None:
    """What is done for the request is done by others, of which there are traces."""
    if isinstance(request.trace, Trace):
        request.trace.composed = True


def _begun(request: InferRequest, numbers: Iterator[int], *, tensors: bool) -> Trace:
    return Trace(
        next(numbers),
        request,
        time.monotonic_ns(),
        version=request.model_version,
        inputs=request.inputs if tensors else {},
        numbers=numbers,
        tensors=tensors,
    )


async def _watched(infer: Infer, request: InferRequest, trace: Trace) -> AsyncGenerator[InferResponse, None]:
    """The responses to a request, while its trace is made."""
    request.trace = trace
    try:
        async with aclosing(infer(request)) as responses:
            async for response in responses:
                trace.ended = time.monotonic_ns()
                trace.version = response.model_version
                trace.timings = response.timings or trace.timings
                if trace.tensors and response.outputs:
                    trace.outputs.append(response.outputs)
                yield response
    except Exception as error:
        trace.error = type(error).__name__
        raise
    finally:
        trace.ended = trace.ended or time.monotonic_ns()
        request.trace = None  # a request is not garbage-collected, so that it must not be in a circle
