"""What becomes of a call that the code of a model makes of another model: the parent's half of `Channel.infer`."""

from __future__ import annotations

from gateway import errors
from gateway.types import EMPTY_FINAL, Batch, Infer, InferRequest, Responses


def call(infer: Infer, batch: Batch, model: str, request: InferRequest) -> Responses:
    """A request of a model that runs `batch`, made ready for `infer`: what a parent does for `Channel.infer`.

    In its `trace` is the place in the batch of the request that it is for, and becomes the trace of that. It is of the tenant of the batch, has to be answered by the time that the last of the batch has, and gives its
    cores away meanwhile. Raises `InvalidArgument` where the model would wait for itself, which may be for ever.
    """
    callers = dict.fromkeys((model, *(each for waiting in batch.requests for each in waiting.callers)))
    if request.model_name in callers:
        raise errors.InvalidArgument(
            f"model '{model}' cannot call '{request.model_name}', which waits for it: their instances could wait for each "
            "other for ever; put the two on one level, or copy the model under another name"
        )
    request.callers = tuple(callers)
    of = request.trace
    request.trace = batch.requests[of].trace if isinstance(of, int) and 0 <= of < len(batch.requests) else None
    request.parameters = {
        **request.parameters,
        EMPTY_FINAL: True,
    }  # a model is told when there is no more, as in Triton
    tenants = {waiting.tenant for waiting in batch.requests}
    request.tenant = tenants.pop() if len(tenants) == 1 else ""
    bounds = [request.deadline, _last_deadline(batch)]
    request.deadline = min((bound for bound in bounds if bound is not None), default=None)
    batch.waits()
    return infer(request)


def _last_deadline(batch: Batch) -> float | None:
    """When nobody waits for the batch any more; None if somebody always does."""
    deadlines = [waiting.deadline for waiting in batch.requests]
    known = [deadline for deadline in deadlines if deadline is not None]
    return max(known) if known and len(known) == len(deadlines) else None
