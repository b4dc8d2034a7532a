"""What an ensemble costs: CPU of requests to three steps in a row against the same three models called one by one.

Without transport, through `Service`, in one process; the models are fake ones that compute nothing, so that what is
compared is the gateway's own work. Run it by itself: `python -m loadtest.ensembles`.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import numpy as np

from gateway.app import running
from gateway.config.settings import Settings
from gateway.service import Service
from gateway.types import DataType, InferRequest, InferResponse, Tensor

_IO = 'input { name: "IN" data_type: TYPE_FP32 dims: 16 } output { name: "OUT" data_type: TYPE_FP32 dims: 16 }'
_MODEL = (
    f'backend: "fake" max_batch_size: 8 dynamic_batching {{ default_queue_policy {{ max_queue_size: 999 }} }} {_IO}'
)
_TENSORS = ("IN", "x", "y", "OUT")
_LIMIT = 1.25

Ask = Callable[[Service], Awaitable[None]]


async def _infer(service: Service, model: str, tensor: Tensor) -> InferResponse:
    async with aclosing(service.infer(InferRequest(model, {"IN": tensor}))) as responses:
        return await anext(responses)


def _tensor() -> Tensor:
    return Tensor.from_array(DataType.FP32, np.zeros((1, 16), np.float32))


async def _one_by_one(service: Service) -> None:
    tensor = _tensor()
    for model in ("a", "b", "c"):
        tensor = (await _infer(service, model, tensor)).outputs["OUT"]


async def _ensemble(service: Service) -> None:
    await _infer(service, "e", _tensor())


def _write(folder: Path) -> None:
    steps = " ".join(
        f'step {{ model_name: "{model}" input_map {{ key: "IN" value: "{given}" }} '
        f'output_map {{ key: "OUT" value: "{made}" }} }}'
        for model, given, made in zip("abc", _TENSORS, _TENSORS[1:], strict=False)
    )
    configs = dict.fromkeys("abc", _MODEL)
    configs["e"] = f'platform: "ensemble" max_batch_size: 8 {_IO} ensemble_scheduling {{ {steps} }}'
    for name, config in configs.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(config)


async def _cost(service: Service, ask: Ask, requests: int, callers: int) -> float:
    """CPU seconds of one request, where so many callers each wait for the answer before they ask again."""

    async def caller() -> None:
        for _ in range(requests // callers):
            await ask(service)

    started = time.process_time()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return (time.process_time() - started) / (requests // callers * callers)


async def measure(rounds: int = 5, requests: int = 2000, callers: int = 8) -> float:
    """How many times the CPU of three calls an ensemble of three steps needs: the median of rounds that take turns."""
    with tempfile.TemporaryDirectory() as made:
        _write(Path(made))
        settings = Settings(model_repository=(Path(made),), allow_http=False, allow_grpc=False, allow_metrics=False)
        async with running(settings) as gateway:
            await gateway.loaded.wait()
            ratios = []
            for _ in range(rounds):
                apart = await _cost(gateway.service, _one_by_one, requests, callers)
                together = await _cost(gateway.service, _ensemble, requests, callers)
                ratios.append(together / apart)
                print(f"one by one {apart * 1e6:.0f} us, as an ensemble {together * 1e6:.0f} us")
            return statistics.median(ratios)


if __name__ == "__main__":
    ratio = asyncio.run(measure())
    print(f"{ratio:.3f} times the CPU of the three models called directly; the limit is {_LIMIT}")
    raise SystemExit(ratio > _LIMIT)
