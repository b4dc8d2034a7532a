"""The classification extension: an output asked for with `classification: k` becomes its k top classes.

Elements are `"<value>:<index>[:<label>]"` as Triton prints them (`classification.cc`), values descending.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import numpy as np
from msgspec.structs import replace

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.types import Array, DataType, Infer, InferRequest, InferResponse, Responses, Tensor

_MAX_ELEMENTS = 1_000_000
_UNSUPPORTED = (DataType.FP16, DataType.BF16, DataType.BOOL, DataType.BYTES)


def classification(infer: Infer, config_of: Callable[[str, str], ModelConfig]) -> Infer:
    """Wrap an endpoint. `config_of(model, version)` gives the labels and whether there is a batch dimension."""

    def classified(request: InferRequest) -> Responses:
        if not request.outputs:
            return infer(request)
        wanted = {output.name: output.classification for output in request.outputs if output.classification}
        # Most requests ask for no classes, and need not pay for another generator.
        return answers(request, wanted) if wanted else infer(request)

    async def answers(request: InferRequest, wanted: dict[str, int]) -> AsyncGenerator[InferResponse, None]:
        # Before the run: when its answer comes, the version may be on its way out.
        config = config_of(request.model_name, request.model_version)
        async with aclosing(infer(request)) as responses:
            async for response in responses:
                yield _classify(response, wanted, config)

    return classified


def _classify(response: InferResponse, wanted: dict[str, int], config: ModelConfig) -> InferResponse:
    labels = {output.name: output.labels for output in config.outputs}
    outputs = {
        name: _top(name, tensor, wanted[name], labels.get(name, ()), batched=config.max_batch_size > 0)
        if name in wanted
        else tensor
        for name, tensor in response.outputs.items()
    }
    return replace(response, outputs=outputs)


def _top(name: str, tensor: Tensor, count: int, labels: tuple[str, ...], *, batched: bool) -> Tensor:
    if tensor.datatype in _UNSUPPORTED:
        raise errors.InvalidArgument(
            f"class result not available for output due to unsupported type '{tensor.datatype.name}'"
        )
    array = tensor.array
    if array.size > _MAX_ELEMENTS:
        raise errors.InvalidArgument(
            f"class result not available for output '{name}': it has {array.size} elements, "
            f"the most that can be classified is {_MAX_ELEMENTS}"
        )
    rows = array.reshape(array.shape[0], -1) if batched else array.reshape(1, -1)
    count = min(count, rows.shape[1])
    top = np.empty((rows.shape[0], count), dtype=object)
    for row, values in enumerate(rows):
        # Sorted ascending and read backwards: negating would wrap unsigned values.
        order = np.argsort(values, kind="stable")[::-1][:count]
        top[row] = [_entry(values, int(index), labels) for index in order]
    return Tensor.from_array(DataType.BYTES, top if batched else top[0])


def _entry(values: Array, index: int, labels: tuple[str, ...]) -> bytes:
    value = values[index]
    text = f"{value:.6f}" if values.dtype.kind == "f" else str(value)
    label = f":{labels[index]}" if index < len(labels) else ""
    return f"{text}:{index}{label}".encode()
