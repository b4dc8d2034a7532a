"""The generate extension's JSON: a body's members become tensors and parameters, and a response becomes one object.

A member named as an input is that tensor, a value or a flat list of them; its shape is what the configuration says, the
innermost open dimension taking what is left. Any other is a request parameter, and those in the object `parameters`
count as members too. In a response an output of one element is that element alone.
"""

from __future__ import annotations

from typing import Any

import orjson

from gateway.config.model import ModelConfig, TensorConfig
from gateway.errors import GatewayError, Internal, InvalidArgument
from gateway.transport.http.codec import json_data
from gateway.transport.http.document import Members, bad_member
from gateway.transport.http.header import json_array
from gateway.transport.http.limits import HttpLimits
from gateway.types import InferRequest, InferResponse, Parameter, Tensor, element_count

_NESTED = "parameters"


def decode(members: Members, config: ModelConfig, version: str, limits: HttpLimits) -> InferRequest:
    """The request that a body asks for. Raises `GatewayError` for a member that is neither tensor nor parameter."""
    reader = _Reader(config, limits)
    for name, value in members:
        if name == "id" and name not in reader.specs:
            if type(value) is not str:
                raise bad_member("id", "string", "string")
            reader.id = value
        elif name == _NESTED:
            reader.nested(value)
        else:
            reader.member(name, value)
    return InferRequest(config.name, reader.tensors, version, reader.id, parameters=reader.parameters)


def encode(response: InferResponse) -> bytes:
    """A response as one JSON object. Raises `InvalidArgument` for an output that JSON cannot carry."""
    told: dict[str, Any] = {"id": response.id} if response.id else {}
    told["model_name"] = response.model_name
    told["model_version"] = response.model_version
    told |= response.parameters
    for name, tensor in response.outputs.items():
        data = json_data(name, tensor)
        told[name] = _only(data) if element_count(tensor.shape) == 1 else data
    return orjson.dumps(told)


def _only(data: Any) -> orjson.Fragment:
    """The one element of what `json_data` gave."""
    return orjson.Fragment(orjson.dumps(data)[1:-1])


class _Reader:
    """What the members read so far come to."""

    def __init__(self, config: ModelConfig, limits: HttpLimits) -> None:
        self.id = ""
        self.specs = {tensor.name: tensor for tensor in config.inputs}
        self.tensors: dict[str, Tensor] = {}
        self.parameters: dict[str, Parameter] = {}
        self._batched = config.max_batch_size > 0
        self._limits = limits

    def member(self, name: str, value: Any) -> None:
        spec = self.specs.get(name)
        if spec is None:
            self.parameters[name] = _parameter(name, value)
        elif name in self.tensors:
            raise InvalidArgument(f"input '{name}' already exists in request")
        else:
            self.tensors[name] = self._tensor(spec, value)

    def nested(self, value: Any) -> None:
        """The members of `parameters`."""
        if _NESTED in self.specs:
            raise InvalidArgument(f"Keyword '{_NESTED}' for nested schema also given as input tensor name")
        if not isinstance(value, Members):
            raise Internal(
                f"Expected JSON object for keyword: '{_NESTED}': attempt to access JSON non-object as object"
            )
        for name, each in value:
            try:
                self.member(name, each)
            except GatewayError as error:
                raise type(error)(f"Converting keyword: '{_NESTED}': {error.message}") from None

    def _tensor(self, spec: TensorConfig, value: Any) -> Tensor:
        elements = value if isinstance(value, list) and not isinstance(value, Members) else [value]
        if len(elements) > self._limits.max_tensor_elements:
            raise InvalidArgument(
                f"input '{spec.name}' has {len(elements)} elements, more than the limit of "
                f"{self._limits.max_tensor_elements}"
            )
        shape = _shape(spec, len(elements), batched=self._batched)
        return Tensor.from_array(spec.datatype, json_array(elements, spec.name, spec.datatype, shape))


def _shape(spec: TensorConfig, count: int, *, batched: bool) -> tuple[int, ...]:
    """The shape with every dimension known: the fixed ones as they are, the innermost open one what they leave."""
    dims = (-1, *spec.dims) if batched else spec.dims
    fixed = element_count(tuple(dim for dim in dims if dim != -1))
    left, rest = divmod(count, fixed) if fixed else (count, 0)
    shape: list[int] = []
    for dim in reversed(dims):
        shape.append(left if dim == -1 else dim)
        left = 1 if dim == -1 else left
    if rest or left != 1:
        raise InvalidArgument(f"The schema can not convert input '{spec.name}' to tensor with proper shape")
    return tuple(reversed(shape))


def _parameter(name: str, value: Any) -> Parameter:
    if type(value) not in (str, int, float, bool):
        raise InvalidArgument(
            f"parameter '{name}' has invalid type. It should be either 'int', 'bool', 'string' or 'double'"
        )
    parameter: Parameter = value
    return parameter
