"""The one error table: each class is a row giving the gRPC status, the HTTP status and whether to retry.

The codes are Triton's (`http_server.cc` HttpCodeFromError, `grpc_utils.cc` CodeToStatus) but for overload
(429 / RESOURCE_EXHAUSTED) and a request's own deadline (504 / DEADLINE_EXCEEDED), which Triton folds into
503. The text of an error is written for the client: what was wrong, what was expected, what to do. It never
carries a path or a trace.

A request that is well formed and still not served gets one of these, and `reason` says which:

| reason          | when                                                               | HTTP | gRPC               | retry |
|-----------------|--------------------------------------------------------------------|------|--------------------|-------|
| `overload`      | on arrival: too much waits for it to be answered by its deadline   | 429  | RESOURCE_EXHAUSTED | yes   |
| `shed`          | after it was accepted: dropped, so that others keep their deadline | 429  | RESOURCE_EXHAUSTED | yes   |
| `bytes`         | on arrival: the gateway holds `--max-inflight-bytes` already       | 429  | RESOURCE_EXHAUSTED | yes   |
| `deadline`      | on arrival: not even an idle model could meet its deadline         | 504  | DEADLINE_EXCEEDED  | no    |
| `expired`       | after it was accepted: its deadline passed or can no longer be met | 504  | DEADLINE_EXCEEDED  | no    |
| `queue_full`    | the model's own `max_queue_size` is reached                        | 503  | UNAVAILABLE        | yes   |
| `queue_timeout` | it waited longer than the model's own queue policy allows          | 503  | UNAVAILABLE        | yes   |
| `unavailable`   | the model is not ready, or the server stops                        | 503  | UNAVAILABLE        | yes   |
| `conflict`      | on arrival: its `Idempotency-Key` came before with another body    | 409  | ALREADY_EXISTS     | no    |
| `crashed`       | run alone, it crashed the process that runs the model              | 500  | INTERNAL           | no    |
| `quarantined`   | the same inputs `crashed` it within the last ten minutes           | 500  | INTERNAL           | no    |
| `sequence_lost` | the worker that had the sequence is gone: to be begun again        | 409  | ABORTED            | no    |

`retry_after`, where it is known, is when to try again: `Retry-After` and `retry-after-ms` on HTTP,
`google.rpc.RetryInfo`, `retry-after-ms` and, with grpcio, `grpc-retry-pushback-ms` on gRPC.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar


class GatewayError(Exception):
    """An error with an answer on both wires. Subclasses are the rows; raise one of those."""

    grpc: ClassVar[int] = 2  # UNKNOWN
    http: ClassVar[int] = 400
    retryable: ClassVar[bool] = False
    reason: ClassVar[str] = ""  # why a good request is not served, one word for metrics; empty for other errors

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        """`retry_after` is in seconds; None when trying again is no use or nobody knows when it will be."""
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class InvalidArgument(GatewayError):
    """The request can never succeed as it stands."""

    grpc, http = 3, 400


class NoConfiguration(InvalidArgument):
    """What a load request carries as the model's configuration is none."""


class NotFound(GatewayError):
    """No such model, version, region or path."""

    grpc, http = 5, 404


class AlreadyExists(GatewayError):
    """The name is taken. 400 on HTTP, as Triton has it."""

    grpc, http = 6, 400


class Conflict(GatewayError):
    """The request's idempotency key came before with another request. 409 on HTTP, unlike `AlreadyExists`."""

    grpc, http = 6, 409
    reason = "conflict"


class Unsupported(GatewayError):
    """Known to the protocol, not done by this server or this model."""

    grpc, http = 12, 501


class Unavailable(GatewayError):
    """Not now: not ready, draining, or refused by the model's own queue policy."""

    grpc, http, retryable = 14, 503, True
    reason = "unavailable"


class QueueFull(Unavailable):
    """The model's configuration allows no more requests to wait (`max_queue_size`)."""

    reason = "queue_full"


class QueueTimeout(Unavailable):
    """The request waited longer than the model's configuration allows (`default_timeout_microseconds`)."""

    reason = "queue_timeout"


class ResourceExhausted(GatewayError):
    """Refused by the gateway's own limits on bytes; try again later."""

    grpc, http, retryable = 8, 429, True
    reason = "bytes"


class Overloaded(ResourceExhausted):
    """Refused at admission: too much is waiting for it to be answered in time."""

    reason = "overload"


class Shed(ResourceExhausted):
    """Accepted, then dropped so that others keep their deadline."""

    reason = "shed"


class DeadlineExceeded(GatewayError):
    """The request's own deadline passed before it was answered, or cannot be met any more."""

    grpc, http = 4, 504
    reason = "expired"


class DeadlineTooShort(DeadlineExceeded):
    """Refused at admission: not even an idle model could answer by the request's own deadline."""

    reason = "deadline"


class Cancelled(GatewayError):
    """The client gave up. 400 on HTTP, as Triton has it; nobody reads it."""

    grpc, http = 1, 400


class Internal(GatewayError):
    """The model or the gateway failed; also, as Triton has it, a body that is not JSON."""

    grpc, http = 13, 500


class Crashed(Internal):
    """Run alone, the request crashed the process that runs the model."""

    reason = "crashed"


class Quarantined(Internal):
    """Not run: the same inputs crashed the process that runs the model a short while ago."""

    reason = "quarantined"


class SequenceLost(GatewayError):
    """The sequence cannot go on, through no fault of its client, which is to begin it again."""

    grpc, http = 10, 409
    reason = "sequence_lost"


class Unauthenticated(GatewayError):
    """No token, or one that is not known."""

    grpc, http = 16, 401


class PermissionDenied(GatewayError):
    """A known caller without the right to this."""

    grpc, http = 7, 403


class MethodNotAllowed(GatewayError):
    """HTTP only: the path exists, the method does not."""

    grpc, http = 12, 405


def request_prefix(request_id: str) -> str:
    """The prefix of every message about a request's content (Triton `infer_request.h` LogRequest)."""
    return f"[request id: {request_id or '<id_unknown>'}] "


def unknown_model(name: str) -> NotFound:
    """No model of this name."""
    return NotFound(f"Request for unknown model: '{name}' is not found")


def unknown_version(name: str, version: str) -> NotFound:
    """The model has no such version."""
    return NotFound(f"Request for unknown model: '{name}' version {version} is not found")


def version_not_ready(name: str, version: str) -> Unavailable:
    """The version is loading, unloading or broken."""
    return Unavailable(f"Request for unknown model: '{name}' version {version} is not at ready state")


def no_versions(name: str) -> NotFound:
    """The model is known and none of its versions is ready."""
    return NotFound(f"Request for unknown model: '{name}' has no available versions")


def bad_version(version: str) -> InvalidArgument:
    """A version on gRPC that is not a positive integer."""
    return InvalidArgument(
        f"failed to get model version from specified version string '{version}' (details: stol), "
        "version should be an integral value > 0"
    )


def unexpected_shape(
    name: str, model: str, expected: Sequence[int], got: Sequence[int], *, batched: bool
) -> InvalidArgument:
    """An input whose shape the model does not take; `expected` includes the batch dimension."""
    note = (
        " NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended "
        "to each input shape. If you want to specify the full shape including the batch dim in your input dims "
        "config, try setting max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
    )
    return InvalidArgument(
        f"unexpected shape for input '{name}' for model '{model}'. Expected {_dims(expected)}, got {_dims(got)}."
        + (note if batched else "")
    )


def batch_too_big(limit: int, model: str) -> InvalidArgument:
    """More rows in one request than `max_batch_size`."""
    return InvalidArgument(f"inference request batch-size must be <= {limit} for '{model}'")


def batch_mismatch(name: str, model: str) -> InvalidArgument:
    """Inputs of one request with different batch sizes."""
    return InvalidArgument(f"input '{name}' batch size does not match other inputs for '{model}'")


def wrong_datatype(name: str, model: str, got: str, expected: str) -> InvalidArgument:
    """An input of another element type than the model's."""
    return InvalidArgument(f"inference input '{name}' data-type is '{got}', but model '{model}' expects '{expected}'")


def wrong_inputs(model: str, got: Sequence[str], missing: Sequence[str], least: int, most: int) -> InvalidArgument:
    """Too few or too many inputs. `least` is the number of required inputs, `most` counts the optional too."""
    head = (
        f"expected {most} inputs but got {len(got)} inputs for model '{model}'."
        if least == most
        else f"expected number of inputs between {least} and {most} but got {len(got)} inputs for model '{model}'."
    )
    tail = (
        f" Got input(s) {_names(got)}, but missing required input(s) {_names(missing)}. "
        "Please provide all required input(s)."
        if missing
        else ""
    )
    return InvalidArgument(head + tail)


def unexpected_input(name: str, model: str) -> InvalidArgument:
    """An input the model does not have."""
    return InvalidArgument(f"unexpected inference input '{name}' for model '{model}'")


def unexpected_output(name: str, model: str) -> InvalidArgument:
    """An output the model does not have."""
    return InvalidArgument(f"unexpected inference output '{name}' for model '{model}'")


def duplicate_output(name: str) -> InvalidArgument:
    """The same output asked for twice."""
    return InvalidArgument(f"output '{name}' already exists in request")


def byte_size_mismatch(name: str, model: str, expected: int, got: int) -> InvalidArgument:
    """An input whose bytes do not fill its shape."""
    return InvalidArgument(
        f"input byte size mismatch for input '{name}' for model '{model}'. Expected {expected}, got {got}"
    )


def reserved_parameter() -> InvalidArgument:
    """A request parameter in Triton's own name space."""
    return InvalidArgument(
        "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."
    )


def one_answer_only() -> Unsupported:
    """A model that may answer often or not at all, asked by gRPC's call for one answer."""
    return Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy")


def repository_name() -> Unsupported:
    """A call about one repository of several."""
    return Unsupported("'repository_name' specification is not supported")


def not_polled(model: str, why: str = "") -> Internal:
    """A model to be loaded that nowhere is to be found, or whose files in the request, by `why`, cannot be a model."""
    return Internal(f"failed to load '{model}', failed to poll from model repository" + (f": {why}" if why else ""))


def shared_memory_disabled() -> Unsupported:
    """Any use of client shared memory where it was not allowed."""
    return Unsupported("Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable.")


def stopping() -> Unavailable:
    """The server is shutting down."""
    return Unavailable("Server not ready")


def deadline_passed() -> DeadlineExceeded:
    """The request's own deadline, wherever it came from, is over."""
    return DeadlineExceeded("Request timeout expired")


def no_worker(model: str) -> Unavailable:
    """The fleet knows the model, and every worker that held it is gone."""
    return Unavailable(
        f"Request for model '{model}' cannot be served: no live worker holds it; start a worker, or try again later",
        1.0,
    )


def keys_unavailable(why: str, retry_after: float | None) -> Unavailable:
    """Whether a request with an idempotency key came before cannot be found out."""
    return Unavailable(
        f"the Idempotency-Key cannot be honoured now: {why}; try again later, or send the request without it",
        retry_after,
    )


def key_reused() -> Conflict:
    """An idempotency key whose first request asked for something else."""
    return Conflict(
        "this Idempotency-Key was used before with other inputs, outputs or parameters; give each request a key of its "
        "own, and repeat a request as it was"
    )


def queue_full(request_id: str, retry_after: float | None) -> QueueFull:
    """As many requests wait as the model's queue policy allows."""
    return QueueFull(request_prefix(request_id) + "Exceeds maximum queue size", retry_after)


def queue_timeout(retry_after: float | None) -> QueueTimeout:
    """The request waited as long as the model's queue policy allows. Triton's text, which is the deadline's too."""
    return QueueTimeout("Request timeout expired", retry_after)


def crashed(model: str, seconds: float) -> Crashed:
    """The request is to blame for the end of its engine's process; equal ones are not run for so long."""
    return Crashed(
        f"this request crashed model '{model}', which was started again; requests with the same inputs are not run for "
        f"{seconds / 60:.0f} minutes. Check the inputs, or mend the model and load it again"
    )


def quarantined(model: str, seconds: float) -> Quarantined:
    """A request like one that crashed the model; so long it still is not run."""
    return Quarantined(
        f"not run: a request with the same inputs crashed model '{model}'; it is not tried again for {seconds:.0f} s. "
        "Check the inputs, or mend the model and load it again"
    )


def too_many_bytes(why: str) -> ResourceExhausted:
    """A request that the limit on all requests together leaves no room for; `why` has both numbers."""
    # Bytes are let go within about the time of a batch, which nobody here knows. Spread out, so that the refused
    # do not come back together.
    return ResourceExhausted(
        f"{why}; retry later, or raise --max-inflight-bytes",
        random.uniform(_SOON, 2 * _SOON),
    )


_SOON = 0.5  # seconds


def _dims(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(dim) for dim in shape) + "]"


def _names(names: Sequence[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"
