"""What a lane's scheduler did and why, as plain values that JSON can carry; see `gateway explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.queues.base import Job
from gateway.scheduling.base import LaneKey
from gateway.scheduling.scheduler import DeadlineScheduler

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def explain(scheduler: DeadlineScheduler[Job], lane: LaneKey, devices: Sequence[str]) -> Mapping[str, object]:
    """Counters since the version was loaded, and what is known of its batches on each device. Times in milliseconds."""
    report = scheduler.report(lane)
    return {
        "admitted": report.admitted,
        "refused": dict(report.refused),
        "late": report.late,
        "late_share": round(report.late_share, 6),
        "spilled": report.spilled,
        "batches": report.batches,
        "failed_batches": report.failed,
        "mean_rows": round(report.rows / report.batches, 3) if report.batches else 0.0,
        "closed": dict(report.closed),
        "predicted_ms": round(report.predicted_seconds * 1e3, 3),
        "actual_ms": round(report.actual_seconds * 1e3, 3),
        "prediction_error": round(report.error, 4),
        "predictions_trusted": report.trusted,
        "devices": {device: _device(scheduler, lane, device) for device in devices},
    }


def _device(scheduler: DeadlineScheduler[Job], lane: LaneKey, device: str) -> Mapping[str, object]:
    model = scheduler.latency(lane, device)
    constant, slope = model.fit
    return {
        "per_batch_ms": round(constant * 1e3, 4),
        "per_row_ms": round(slope * 1e3, 4),
        "tail_ratio": round(model.tail, 3),
        "largest_rows_seen": model.largest,
        "efficient_rows": model.efficient,
        "predicted_ms_by_rows": {
            str(rows): round(model.mean(rows) * 1e3, 4) for rows in _SIZES if rows <= model.largest
        },
    }
