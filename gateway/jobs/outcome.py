"""One run of a leased job: the request is unpacked and asked of `infer`, and its end is what the record is to say."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, NamedTuple, TypeAlias

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.jobs.leases import Claim
from gateway.jobs.record import State
from gateway.jobs.store import check_size
from gateway.message import BadMessage, pack_error, pack_response, unpack_request
from gateway.queues.redis.seal import Seal
from gateway.telemetry import log_event
from gateway.types import Infer, InferRequest, InferResponse

_LOWEST = 1 << 30  # where the model does not count its priorities; they grow less urgent with their number
_WAITS = 5  # times that a run waits for its turn in a busy gateway
_WAIT, _LONGEST_WAIT = 1.0, 5.0  # seconds
_LONGEST_RUN = 3600.0  # seconds
_LARGE = 1 << 20  # bytes from which packing is work for a thread


class Retry(NamedTuple):
    """The job is to be run again, because of this."""

    error: errors.GatewayError


Ended: TypeAlias = tuple[State, dict[str, Any]]
"""The job's last state, and the fields of its record."""


async def run(
    claim: Claim,
    infer: Infer,
    config_of: Callable[[str, str], ModelConfig],
    seal: Seal,
    clock: Callable[[], float],
) -> Ended | Retry:
    """Run a job to its end, or to where it must be run again. `clock` is Redis'."""
    try:
        for _ in range(_WAITS):
            request = _request(claim, seal)
            # A run that hangs must not keep its place, and the tensors it left in Redis, until the job expires.
            request.deadline = time.monotonic() + min(claim.job.expires - clock(), _LONGEST_RUN)
            try:
                if not request.priority and not request.parameters.get("priority"):
                    batching = config_of(request.model_name, request.model_version).batching
                    request.priority = (batching.priority_levels if batching else 0) or _LOWEST
                response = await _only(infer, request)
                large = sum(tensor.nbytes for tensor in response.outputs.values()) > _LARGE
                return await asyncio.to_thread(_done, response, claim, seal) if large else _done(response, claim, seal)
            except errors.ResourceExhausted as busy:
                error = busy
            # Its place in this gateway is kept, or every other job would be refused in its stead.
            await asyncio.sleep(min(error.retry_after or _WAIT, _LONGEST_WAIT))
        return Retry(error)
    except BadMessage as problem:
        return "dead", {"error": pack_error(problem)}
    except errors.GatewayError as error:
        # A model that is not found was there when the job came: its workers start, or it is being replaced.
        absent = isinstance(error, errors.NotFound | errors.Cancelled)
        if error.retryable or absent or (isinstance(error, errors.DeadlineExceeded) and clock() < claim.job.expires):
            return Retry(error)
        return "failed", {"error": pack_error(error)}
    except Exception as fault:  # noqa: BLE001 - a fault of ours is the job's end, and nobody else's
        log_event("job_failed", logging.ERROR, fault, job=claim.job.id)
        return "failed", {
            "error": pack_error(errors.Internal(f"internal error; the server's log has it as job {claim.job.id}"))
        }


def _request(claim: Claim, seal: Seal) -> InferRequest:
    header, payload, signature = claim.request
    seal.verify(signature, claim.job.id.encode(), header, payload)
    return unpack_request(header, payload)


async def _only(infer: Infer, request: InferRequest) -> InferResponse:
    async with aclosing(infer(request)) as responses:
        async for response in responses:
            if not response.final:
                raise errors.Unsupported("async jobs don't support models with decoupled transaction policy")
            return response
    raise errors.Internal(f"model '{request.model_name}' ended without an answer")


def _done(response: InferResponse, claim: Claim, seal: Seal) -> Ended:
    header, parts = pack_response(response)
    payload = b"".join(parts)
    check_size(len(payload), "result")
    return "done", {
        "result": header,
        "output": payload,
        "sealed": seal.sign(claim.job.id.encode(), header, payload),
    }
