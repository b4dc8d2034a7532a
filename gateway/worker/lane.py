"""What the scheduler is told of a version: its bounds, from the configuration, and where it runs."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.config import model as config_model
from gateway.config.model import ModelConfig
from gateway.engines.base import Engine
from gateway.placement import Placement
from gateway.scheduling.base import Limits, Place, QueuePolicy
from gateway.worker.running import where


def limits(config: ModelConfig) -> Limits:
    """A model's own bounds and Triton's knobs."""
    batching = config.batching
    if batching is None:
        return Limits(max_rows=max(config.max_batch_size, 1))
    preferred = batching.preferred_batch_sizes
    return Limits(
        max_rows=max(config.max_batch_size, 1),
        joins=config.max_batch_size > 1,
        delay=batching.max_queue_delay_us / 1e6,
        # Triton's default, the largest batch, asks for nothing: a batch grows to that size anyway.
        preferred=() if preferred == (config.max_batch_size,) else preferred,
        queue=_policy(batching.queue_policy),
        priority_levels=batching.priority_levels,
        default_priority=batching.default_priority_level,
        priority_queues={level: _policy(each) for level, each in batching.priority_queue_policies.items()},
    )


def places(engines: Sequence[tuple[Engine, Placement]]) -> list[Place]:
    """Where these engines run, one entry a device."""
    found: dict[str, Place] = {}
    for engine, placement in engines:
        name, threads = where(engine, placement)
        known = found.get(name, Place(name, 0, threads))
        found[name] = Place(name, known.count + engine.concurrency, min(threads, known.threads), engine.widest)
    return list(found.values())


def _policy(policy: config_model.QueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        max_size=policy.max_queue_size,
        timeout=policy.default_timeout_us / 1e6,
        delays=policy.delays,
        allow_override=policy.allow_timeout_override,
    )
