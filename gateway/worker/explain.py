"""What a lane's scheduler did and why, as plain values that JSON can carry; see `gateway explain`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.config.model import ModelConfig
from gateway.queues.base import Job
from gateway.scheduling.base import LaneKey
from gateway.scheduling.scheduler import DeadlineScheduler
from gateway.types import InferRequest, element_count

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def explain(scheduler: DeadlineScheduler[Job], lane: LaneKey, devices: Sequence[str]) -> dict[str, Any]:
    """What only the scheduler counts since the version was loaded, and what is known of its batches on each device.

    Times are in milliseconds; the predicted and the actual are of the runs that measured, too.
    """
    report = scheduler.report(lane)
    return {
        "spilled": report.spilled,
        "failed_batches": report.failed,
        "predicted_ms": round(report.predicted_seconds * 1e3, 3),
        "actual_ms": round(report.actual_seconds * 1e3, 3),
        "prediction_error": round(report.error, 4),
        "predictions_trusted": report.trusted,
        "devices": {device: _device(scheduler, lane, device) for device in devices},
    }


def foresee(scheduler: DeadlineScheduler[Job], lane: LaneKey, config: ModelConfig, seconds: float) -> Mapping[str, Any]:
    """What a request of one row would be told that came now and had so many seconds; 0 for any time.

    An open dimension counts as one element, a string as an empty one.
    """
    now = time.monotonic()
    size = sum(abs(element_count(each.dims)) * (each.datatype.itemsize or 4) for each in config.inputs)
    request = InferRequest(config.name, {}, size=size, deadline=now + seconds if seconds else None)
    refusal, answered = scheduler.foresee(lane, request, now)
    return {
        "deadline_ms": round(seconds * 1e3, 3) if seconds else None,
        "answered_in_ms": round(answered * 1e3, 4),
        "refused": None if refusal is None else refusal.reason,
        "text": "" if refusal is None else refusal.text,
    }


def _device(scheduler: DeadlineScheduler[Job], lane: LaneKey, device: str) -> Mapping[str, Any]:
    model = scheduler.latency(lane, device)
    constant, slope = model.fit
    return {
        "batches_seen": model.batches,
        "per_batch_ms": round(constant * 1e3, 4),
        "per_row_ms": round(slope * 1e3, 4),
        "tail_ratio": round(model.tail, 3),
        "largest_rows_seen": model.largest,
        "efficient_rows": model.efficient,
        "predictions_trusted": model.trusted,
        "predicted_ms_by_rows": {
            str(rows): round(model.mean(rows) * 1e3, 4) for rows in _SIZES if rows <= model.largest
        },
    }
