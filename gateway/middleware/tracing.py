"""Traces of single requests: when they began, waited, ran and ended, and if wanted what went in and came out.

A wrapper `Infer -> Infer`. What the timestamps say is taken from the timings of the last response, laid back to back
before it: the stages are as long as they were, and end when the answer was there. Times are `time.monotonic_ns`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

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

    def timestamps(self, *, wanted: bool) -> list[tuple[str, int]]:
        """The stages by Triton's names, in their order; none, where they are not wanted."""
        if not wanted:
            return []
        stamps = [("REQUEST_START", self.started)]
        if (spent := self.timings) is not None:
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
        return [*stamps, ("INFER_RESPONSE_COMPLETE", self.ended), ("REQUEST_END", self.ended)]


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
        trace = Trace(next(numbers), request, time.monotonic_ns(), version=request.model_version)
        tensors = "TENSORS" in sampling.level
        if tensors:
            trace.inputs = request.inputs
        try:
            async with aclosing(infer(request)) as responses:
                async for response in responses:
                    trace.ended = time.monotonic_ns()
                    trace.version = response.model_version
                    trace.timings = response.timings or trace.timings
                    if tensors and response.outputs:
                        trace.outputs.append(response.outputs)
                    yield response
        except Exception as error:
            trace.error = type(error).__name__
            raise
        finally:
            trace.ended = trace.ended or time.monotonic_ns()
            keep(trace, sampling)

    return endpoint
