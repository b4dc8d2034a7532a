"""What the instances of a version run on and from, where clients and scrapers look: in its configuration and as a metric.

Triton's messages have no field for it. A parameter of the configuration is the one place that every Triton client reads
and passes over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec import json

from gateway.config.model import ModelConfigProto
from gateway.queues.base import PoolState
from gateway.service import Service
from gateway.service.reports import running
from gateway.telemetry import Family

PARAMETER = "gateway_instances"
_DEGRADED = "Number of instances that run on another link of their chain than the first"
_TEXT = "Number of instances by what they run on, and by the artefact that they run"


def configuration(service: Service, name: str, version: str) -> ModelConfigProto:
    """The configuration of a ready version, with what its instances run on as a parameter, in JSON."""
    config: Any = service.model_config(name, version).proto
    if not (instances := service.instances(name, version)):
        return config
    told = type(config)()
    told.CopyFrom(config)
    told.parameters[PARAMETER].string_value = json.encode(instances).decode()
    return told


def instance_metrics(pools: Iterable[PoolState]) -> list[Family]:
    """A sample for each different way in which a version runs, its value the number of instances; and how many of them do
    not run on what they should.
    """
    versions = [
        ({"model": pool.model, "version": state.version}, state.instances)
        for pool in pools
        for state in pool.versions
        if state.instances
    ]
    return [
        Family(
            "gateway_instances",
            "gauge",
            _TEXT,
            [
                ({**version, **labels}, count)
                for version, instances in versions
                for labels, count in map(_labelled, running(instances))
            ],
        ),
        Family(
            "gateway_instances_degraded",
            "gauge",
            _DEGRADED,
            [(version, sum(bool(each.reason) for each in instances)) for version, instances in versions],
        ),
    ]


def _labelled(entry: dict[str, Any]) -> tuple[dict[str, str], int]:
    count = entry.pop("count")
    entry.pop("reason", None)  # for people, and another each time
    return entry, count
