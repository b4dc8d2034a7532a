"""What a job looks like to clients, receivers of webhooks and operators: plain values for JSON. Never its inputs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from gateway.jobs.record import Job


def view(job: Job) -> dict[str, Any]:
    """A job's state, times (UTC, RFC 3339), attempts and, if it failed or waits to be run again, the error."""
    shown: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "model_name": job.model,
        "model_version": job.version,
        "position": job.position,
        "attempts": job.attempts,
        "created_at": _moment(job.created),
        "started_at": _moment(job.started),
        "finished_at": _moment(job.finished),
        "expires_at": None if job.final else _moment(job.expires),
        "callback": {"url": job.callback, "state": job.hook or "waiting", "attempts": job.hook_attempts}
        if job.callback
        else None,
    }
    error = job.error
    if error is not None:
        shown |= {"error": error.message, "error_type": type(error).__name__, "error_status": error.http}
    return {name: value for name, value in shown.items() if value not in (None, "")}


def _moment(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
