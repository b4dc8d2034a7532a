"""Jobs by request parameters, for gRPC, which has no other way to say it: a wrapper `Infer -> Infer`.

| parameter                | what                                                                                          |
|--------------------------|-----------------------------------------------------------------------------------------------|
| `async` (bool)           | the request becomes a job; answered at once with `job_id`, `job_state` and no outputs         |
| `callback` (string)      | beside `async`: a URL to tell of the end                                                      |
| `job_id` (string)        | not an inference: the job's answer when it is done, its error when it failed, else `job_state`|
| `job_cancel` (bool)      | beside `job_id`: cancel the job                                                               |

Answers carry `job_id`, `job_state`, `job_attempts` and, while it is queued, `job_position` as parameters.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from msgspec.structs import replace

from gateway import errors
from gateway.jobs.base import REMEDY, Result
from gateway.jobs.record import Job
from gateway.types import Infer, InferRequest, InferResponse, Parameter, Responses

if TYPE_CHECKING:
    from gateway.jobs.jobs import Jobs

_NAMES = ("async", "job_id")


def by_parameter(infer: Infer, jobs: Jobs | None) -> Infer:
    """Wrap an endpoint. Without `jobs` such requests are answered `Unsupported`, with the remedy."""

    def routed(request: InferRequest) -> Responses:
        parameters = request.parameters
        # Nearly every request has none.
        if parameters and any(parameters.get(name) for name in _NAMES):
            return answered(request)
        return infer(request)

    async def answered(request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        if jobs is None:
            raise errors.Unsupported(REMEDY)
        identity = request.parameters.get("job_id")
        if identity:
            yield await _looked_up(jobs, request, str(identity))
        else:
            yield await _submitted(jobs, request)

    return routed


async def _submitted(jobs: Jobs, request: InferRequest) -> InferResponse:
    parameters = dict(request.parameters)
    if parameters.pop("async") is not True:
        raise errors.InvalidArgument("invalid value type for 'async' parameter, expected bool_param.")
    callback = parameters.pop("callback", "")
    if not isinstance(callback, str):
        raise errors.InvalidArgument("invalid value type for 'callback' parameter, expected string_param.")
    job = await jobs.submit(replace(request, parameters=parameters), callback=callback)
    return _status(job, request.id)


async def _looked_up(jobs: Jobs, request: InferRequest, identity: str) -> InferResponse:
    if request.parameters.get("job_cancel"):
        return _status(await jobs.cancel(identity, request.tenant), request.id)
    job = await jobs.get(identity, request.tenant)
    result = await jobs.result(job)
    if isinstance(result, Result):
        response = result.response
        return replace(response, parameters={**response.parameters, **_parameters(job)})
    if result is not None:
        raise result
    return _status(job, request.id)


def _status(job: Job, request_id: str) -> InferResponse:
    return InferResponse(job.model, job.version, {}, request_id, _parameters(job))


def _parameters(job: Job) -> dict[str, Parameter]:
    told: dict[str, Parameter] = {"job_id": job.id, "job_state": job.state, "job_attempts": job.attempts}
    return told if job.position is None else {**told, "job_position": job.position}
