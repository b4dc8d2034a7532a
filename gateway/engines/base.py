"""The `Engine` protocol: the adapter that runs one loaded copy of a model on one device.

Promises every engine keeps (tests/contract/test_engine.py): blocking work never runs on the event loop;
`run` calls `batch.stack()` on the engine's own thread; a failed run raises and leaves the engine usable;
`provider` says what the model really runs on, not what was asked; `close` is idempotent and frees threads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from gateway.artefacts import Artefact
from gateway.config.model import ModelConfig
from gateway.engines.channel import Channel
from gateway.engines.isolated.children import Children
from gateway.types import Batch, BatchResult, Infer, Parameter


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is made from.

    `threads` is how many cores a run gets when its device is loaded; `cores` is how many a lone run may
    use. An engine whose two numbers differ is elastic: it looks at `batch.cores` on each run.
    """

    config: ModelConfig
    version: str
    path: Path  # the version folder, e.g. model_repo/digits/1
    device: str  # "cpu", "gpu:0", ...
    threads: int = 1
    cores: int = 1
    artefact: Artefact | None = None  # what of the version is run; None: its `default_model_filename` as it is
    provider: str = ""  # the execution provider that must run it, or the load is refused; empty: what there is
    cpu_cores: int = 1  # how many cores a run gets that is on the CPU though `device` is not
    infer: Infer | None = None  # how its code calls other models; in the process of the worker only
    channel: Channel | None = None  # the same in a child process, which the child itself fills in
    children: Children | None = None  # where there are child processes to live in


class EngineCrashed(Exception):
    """The process that ran the batch died or was killed: the batch, or the machine, is to blame; no answer was given.

    The engine starts itself again: the next `run` waits for that, or raises `Unavailable` when it cannot. `sure` is False
    where something else than the batch may have ended the process: a signal from outside, or another batch in it.
    """

    def __init__(self, message: str, *, sure: bool = True) -> None:
        super().__init__(message)
        self.sure = sure


class DeviceOutOfMemory(MemoryError):
    """The device has not the memory for this batch, or for this model; the engine stays usable, a smaller batch may fit."""


class Results(Protocol):
    """What an engine gives to one batch; closing it gives up what is still to come. Any async generator of them will do."""

    def __aiter__(self) -> AsyncIterator[BatchResult]: ...

    def __anext__(self) -> Awaitable[BatchResult]: ...

    def aclose(self) -> Awaitable[None]:
        """Give up the rest."""


class Once:
    """The `Results` of a model of one answer, with none of what asyncio does for a generator."""

    __slots__ = ("_result",)

    def __init__(self, result: Coroutine[Any, Any, BatchResult]) -> None:
        self._result: Coroutine[Any, Any, BatchResult] | None = result  # until it is asked for

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[BatchResult]:
        """The result, once."""
        result, self._result = self._result, None
        if result is None:
            raise StopAsyncIteration
        return result

    async def aclose(self) -> None:
        """A result that nobody has asked for will not be."""
        if self._result is not None:
            self._result.close()


class Engine(Protocol):
    """One instance's way to run batches. What it says of itself may change where it is a chain (`FallbackEngine.tend`)."""

    @property
    def provider(self) -> str:
        """What it really runs on, now."""

    @property
    def artefact(self) -> Artefact | None:
        """The file it runs; None where there is none to choose from."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know though the model works, e.g. that the best engine did not start."""

    @property
    def widest(self) -> int:
        """The most cores a run can use."""

    @property
    def concurrency(self) -> int:
        """How many runs may be open at once."""

    @property
    def ahead(self) -> bool:
        """Whether `run` may be called for one batch more than `concurrency`, to be laid out while the others run."""

    @property
    def contained(self) -> bool:
        """Whether this process outlives whatever a run does."""

    def run(self, batch: Batch) -> Results:
        """Run a batch; a model of one answer yields once. Raises `GatewayError`, or anything on a crash."""

    async def close(self) -> None:
        """Release the model and its threads. Idempotent."""


def identity(engine: Engine) -> dict[str, Parameter]:
    """What a client that asks is told of the engine that answered it, as response parameters."""
    if engine.artefact is None:
        return {"engine": engine.provider}
    return {"engine": engine.provider, "precision": engine.artefact.precision, "artefact": engine.artefact.name}
