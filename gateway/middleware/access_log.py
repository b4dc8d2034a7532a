"""The access log: one line for each inference request, however it ended.

A wrapper `Infer -> Infer`, installed only when the access log is on. It writes names, sizes and times,
never tensor data, and changes nothing about the request or its answers.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from gateway.errors import GatewayError
from gateway.telemetry import log_event
from gateway.types import Infer, InferRequest, InferResponse, Timings


def access_log(inner: Infer) -> Infer:
    """Wrap an endpoint so that each request leaves an `infer` event.

    `status` is OK or the error's class; `version` is the one that answered; `refused` is there where a good request
    was not served, and says why in a word of the table of refusals. Times are microseconds:
    `queue_us` and `compute_us` of the last answer, `total_us` until that answer or the error.
    """

    async def logged(request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        started = ended = time.monotonic_ns()
        last: InferResponse | None = None
        refused = ""
        status = "Cancelled"  # what remains when neither a final answer nor an error came: the caller closed
        try:
            async with aclosing(inner(request)) as responses:
                async for response in responses:
                    last = response
                    ended = time.monotonic_ns()
                    if response.final:
                        status = "OK"
                    yield response
        except GatewayError as error:
            status = type(error).__name__
            refused = error.reason
            ended = time.monotonic_ns()
            raise
        except Exception:  # a fault below must not be logged as the caller's cancellation
            status = "Internal"
            ended = time.monotonic_ns()
            raise
        finally:
            _write(request, last, status, ended - started, refused)

    return logged


def _write(request: InferRequest, last: InferResponse | None, status: str, total_ns: int, refused: str) -> None:
    timings = (last.timings if last else None) or Timings()
    log_event(
        "infer",
        id=request.id,
        model=request.model_name,
        version=last.model_version if last else request.model_version,
        tenant=request.tenant,
        status=status,
        rows=request.rows,
        batch_rows=timings.batch_rows,
        queue_us=timings.queue_ns // 1000,
        compute_us=(timings.compute_input_ns + timings.compute_infer_ns + timings.compute_output_ns) // 1000,
        total_us=total_ns // 1000,
        **({"refused": refused} if refused else {}),
    )
