"""An ensemble on a worker: a version without engines, ready while the models of its steps are and fit together.

It has what the `Worker` needs of a `Host`. Gateways run its requests step by step (`middleware/ensemble.py`), so here
is nothing to serve; when it is unloaded or the worker stops, those of this process end first, while their models are
still there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.config.ensemble import fit
from gateway.config.model import ModelConfig
from gateway.errors import InvalidArgument
from gateway.placement import Placement
from gateway.queues.base import Capacity, InstanceState, Lane, PoolState
from gateway.types import InferRequest
from gateway.worker.source import Source

UNLOADED = "unloaded"

Drained = Callable[[Lane], Awaitable[None]]
"""Waits until this process runs no request of an ensemble's version."""


class EnsembleHost:
    """A loaded version of an ensemble. `reason` says why it cannot answer now; it is empty while it can."""

    instances: tuple[InstanceState, ...] = ()
    warnings: tuple[str, ...] = ()
    digest = ""
    asks_all = False

    def __init__(
        self, source: Source, pool: Callable[[str], PoolState | None], drained: Drained | None, *, replaces: bool
    ) -> None:
        """`pool` tells what is held of a model. One that `replaces` another must be able to answer at once."""
        self.source = source
        self.lane = Lane(source.config.name, source.version)
        self.reason = ""
        self.changed: Callable[[], None] = lambda: None
        self._pool = pool
        self._drained = drained
        self._replaces = replaces
        self._stopped = asyncio.Event()

    async def load(self, placements: Sequence[Placement]) -> None:  # noqa: ARG002 - it runs nowhere
        """Check it against its models. Raises `InvalidArgument` when it would replace one that can answer."""
        self.refit()
        if self.reason and self._replaces:
            raise InvalidArgument(self.reason)

    def refit(self) -> None:
        """Check it again: its models are others now."""
        config = self.source.config
        lost = [pool for step in config.steps if (pool := self._pool(step.model)) is not None and _unloaded(pool)]
        try:
            fitting = fit(config, self._config)
        except InvalidArgument as problem:
            # Its models were taken away on purpose, and so it was: that is no fault of the server.
            self.reason = UNLOADED if lost else problem.message
        else:
            self.reason = ""
            self.source = replace(self.source, config=fitting)

    def _config(self, model: str, version: str) -> ModelConfig:
        ensemble = self.source.config.name
        pool = self._pool(model)
        if pool is None:
            raise InvalidArgument(f"ensemble '{ensemble}' contains models that are not available or ambiguous: {model}")
        ready = {state.version: state for state in pool.versions if state.state == "READY"}
        if not ready:
            why = pool.reason or "; ".join(state.reason for state in pool.versions if state.reason)
            raise InvalidArgument(
                f"ensemble '{ensemble}' depends on '{model}' which has no loaded version."
                + (f" Model '{model}' loading failed with error: {why}" if why else "")
            )
        if version and version not in ready:
            raise InvalidArgument(
                f"ensemble '{ensemble}' depends on '{model}' whose required version {version} is not loaded"
            )
        found = ready[version or max(ready, key=int)].config
        assert found is not None  # of what is READY
        return found

    async def serve(self) -> None:
        """Be there until `drain` or `retire`."""
        await self._stopped.wait()

    async def drain(self) -> None:
        """Wait until this process's requests are answered, then stop."""
        if self._drained is not None:
            await self._drained(self.lane)
        await self.retire()

    async def retire(self) -> None:
        """Stop: a successor has the next requests, and those under way need nothing of this."""
        self._stopped.set()

    def report(self) -> None:
        """Nothing: gateways count its requests."""

    # --- Admission: each step has its own

    def admit(self, request: InferRequest) -> None:
        """See `Admission.admit`."""

    def settle(self, request: InferRequest) -> None:
        """See `Admission.settle`."""

    def turn_away(self, deadline: float) -> float | None:  # noqa: ARG002 - its models are asked
        """See `Admission.turn_away`."""
        return None

    def turned_away(self, times: int) -> None:
        """See `Admission.turned_away`."""

    def capacity(self) -> Capacity | None:
        """See `Admission.capacity`: its models have it."""
        return None

    def explain(self, seconds: float) -> Mapping[str, Any]:  # noqa: ARG002 - its models tell
        """See `Admission.explain`: the models that it runs."""
        return {"steps": [step.model for step in self.source.config.steps]}


def _unloaded(pool: PoolState) -> bool:
    """Whether a command took the model away."""
    return bool(pool.versions) and all(
        state.state == "UNLOADING" or state.reason == UNLOADED for state in pool.versions
    )
