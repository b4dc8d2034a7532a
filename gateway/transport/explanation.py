"""What a server says of a model, for people: fixed width, times with their units, and what to do about refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

REMEDIES = {
    "overload": "more came than can be answered in time; retry after Retry-After, give more time, or add devices",
    "shed": "accepted, then dropped so that others stay in time; as for overload",
    "bytes": "the requests held came to --max-inflight-bytes; raise it, or send less at once",
    "deadline": "the deadline is shorter than a run of the model; give the requests more time",
    "expired": "the deadline passed, or could not be met any more; give more time, or send less at once",
    "queue_full": "the model's max_queue_size; raise it or leave it out: deadlines bound the queue too",
    "queue_timeout": "the model's default_timeout_microseconds; raise it or leave it out",
    "unavailable": "the model was not ready or the server stopped; its log says which",
    "conflict": "an Idempotency-Key was used for two different requests; give each request its own",
    "crashed": "a request that crashes the model by itself, its digest is in the log; mend the model, or the request",
    "quarantined": "a request that crashed the model, sent again; it is not run for ten minutes",
    "sequence_lost": "a request of a sequence whose worker died or stopped; the client is to begin it again",
}
"""What to do about refused requests, by the reasons of the table of refusals."""

CLOSED = {
    "drained": "nothing else waited",
    "full": "the largest batch of the model",
    "single": "the model does not join requests",
    "deadline": "a larger batch would have missed a deadline",
    "explore": "larger batches were not tried yet; sizes double",
    "share": "the rest was left to the other instances or the next run",
    "shape": "what else waited had another shape",
    "preferred": "a preferred_batch_size was reached",
    "retry": "a batch had failed; parts of it ran, down to single requests",
    "delay": "max_queue_delay_microseconds or a deadline ran out",
}
"""Why batches closed, in words."""

_NAME = 15  # characters that tell one process from another
_WIDTH = 26  # of the labels
_COUNT = 10  # of the figures after them


def merged(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the service says, with what each worker of a fleet told of itself as one; devices get their worker's name."""
    if "workers" not in told:
        return told
    workers: Sequence[Mapping[str, Any]] = sorted(told["workers"], key=lambda each: str(each["worker"]))
    names = [str(each["worker"]) for each in workers]
    sums = ("spilled", "failed_batches", "predicted_ms", "actual_ms")
    return {
        **told,
        **{key: sum(each[key] for each in workers) for key in sums},
        "prediction_error": max((each["prediction_error"] for each in workers), default=0.0),
        "predictions_trusted": all(each["predictions_trusted"] for each in workers),
        "devices": {
            f"{name[:_NAME]} {device}": known
            for name, each in zip(names, workers, strict=True)
            for device, known in each["devices"].items()
        },
        "workers": names,
    }


def explanation(told: Mapping[str, Any]) -> str:
    """The text for the answer of `/v2/models/MODEL/explain`. Raises KeyError, or others, for what is not one."""
    lines = [f"model {told['model']}, version {told['version']}"]
    lines += [f"  {_instances(each)}" for each in told["instances"]]
    if "workers" in told:
        lines.append(f"workers that answered: {len(told['workers'])}")
    for block in (_next(told["next"]), _requests(told), _batches(told)):
        lines += ["", *block]
    for name, device in told["devices"].items():
        lines += ["", *_device(name, device)]
    return "\n".join(line.rstrip() for line in lines)


def _instances(entry: Mapping[str, Any]) -> str:
    made = f", {entry['artefact']} ({entry['precision']})" if entry["artefact"] else ""
    link = f", link {entry['link']}" if "link" in entry else ""
    reason = f", {entry['reason']}" if "reason" in entry else ""
    return f"{entry['count']} x {entry['device']} {entry['provider']}{made}{link}{reason}"


def duration(milliseconds: float) -> str:
    """A time in the unit that suits it, with three digits that count."""
    if milliseconds <= 0:
        return "0 ms"
    for unit, size in (("us", 1e-3), ("ms", 1.0), ("s", 1e3)):
        value = float(f"{milliseconds / size:.3g}")
        if value < 1000 or unit == "s":
            break
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}" if value >= 1 else f"{value:.3g} {unit}"


def _next(asked: Mapping[str, Any]) -> Iterator[str]:
    within = "no deadline" if asked["deadline_ms"] is None else f"a deadline in {duration(asked['deadline_ms'])}"
    yield f"THE NEXT REQUEST, of one row, with {within}"
    if asked["refused"] is None:
        yield f"  would be accepted, and answered in about {duration(asked['answered_in_ms'])}"
        return
    yield f"  would be refused: {asked['text']} ({asked['refused']})"
    yield f"  {REMEDIES.get(asked['refused'], '')}"


def _requests(told: Mapping[str, Any]) -> Iterator[str]:
    refused = _sorted(told["refused"])
    yield "REQUESTS since the model was loaded"
    yield _line("answered", told["answered"])
    yield _line("accepted on condition", told["admitted"], "those with a deadline, a priority or a tenant")
    yield _line("late", told["late"], f"{told['late_share']:.2%} of these were not answered by their deadline")
    if told["spilled"]:
        yield _line("sent to a slower device", told["spilled"], "the fastest would have answered them late")
    yield _line("refused", sum(refused.values()))
    for reason, count in refused.items():
        yield _line(f"  {reason}", count, REMEDIES.get(reason, ""))


def _batches(told: Mapping[str, Any]) -> Iterator[str]:
    closed = _sorted(told["closed"])
    yield "BATCHES since the model was loaded"
    yield _line("run", told["batches"], f"{told['mean_rows']:.3g} rows each, on average")
    if told["failed_batches"]:
        yield _line("failed", told["failed_batches"], "run again request by request; the log says why")
    yield _line("took", duration(told["actual_ms"]), f"predicted: {duration(told['predicted_ms'])}; with measuring")
    yield _line("predictions are off by", f"{told['prediction_error']:.1%}", f"lately; {_trust(told)}")
    for reason, count in closed.items():
        share = f"{count / sum(closed.values()):6.1%}  {CLOSED.get(reason, '')}"
        yield _line(f"closed: {reason}", count, share)


def _device(name: str, device: Mapping[str, Any]) -> Iterator[str]:
    yield f"DEVICE {name}"
    if not device["largest_rows_seen"]:
        yield "  nothing has run here yet, so nothing is known"
        return
    yield _line("a batch takes", duration(device["per_batch_ms"]), f"and {duration(device['per_row_ms'])} for each row")
    yield _line("19 of 20 end within", f"{device['tail_ratio']:.2f} x", "the predicted time")
    yield _line("efficient from", device["efficient_rows"], "rows a batch; larger ones gain little")
    yield _line("largest seen", device["largest_rows_seen"], f"rows, in {device['batches_seen']} batches")
    yield _line("predictions", "trusted" if device["predictions_trusted"] else "wrong", _trust(device))
    for rows, milliseconds in device["predicted_ms_by_rows"].items():
        yield _line(f"  {rows} row{'' if rows == '1' else 's'}", duration(milliseconds))


def _trust(told: Mapping[str, Any]) -> str:
    return "they are relied on" if told["predictions_trusted"] else "not relied on: first in, first out for now"


def _line(label: str, figure: object, remark: str = "") -> str:
    return f"  {label:<{_WIDTH}}{figure!s:>{_COUNT}}  {remark}"


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(counts.items(), key=lambda each: -each[1]))
