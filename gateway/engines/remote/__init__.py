"""The `remote` backend: a model of another gateway or a Triton, over gRPC or HTTP, as an engine.

`config.pbtxt` says where (README.md has the parameters); `options` reads it, `engine` is the `Engine`, `pool` decides
which server is asked and whether once more, by what `health`, `limit` and `budget` know, and `grpc_client` and
`http_client` speak. The remaining deadline travels with each request. What it does not do: decoupled models, and
sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from gateway import errors
from gateway.config.build import datatype
from gateway.config.fit import check_fit
from gateway.config.model import ModelConfig, ModelConfigProto
from gateway.engines.base import Engine, EngineSpec
from gateway.engines.remote.client import Client
from gateway.engines.remote.engine import RemoteEngine
from gateway.engines.remote.failures import Failure
from gateway.engines.remote.grpc_client import GrpcClient
from gateway.engines.remote.grpc_client import fetch as fetch_by_grpc
from gateway.engines.remote.http_client import HttpClient
from gateway.engines.remote.http_client import fetch as fetch_by_http
from gateway.engines.remote.options import Address, Options, read
from gateway.engines.remote.pool import Pool, Target
from gateway.engines.threads import EngineThread
from gateway.types import ModelIO, TensorSpec


async def create(spec: EngineSpec, count: int) -> list[Engine]:
    """So many engines that share the connections. They are made whether or not a server answers now.

    Raises `InvalidArgument` for parameters, or a configuration that a server says its model does not fit, and
    `Unsupported` for a decoupled model.
    """
    threads = [EngineThread(f"{spec.config.name}/{spec.version}#{index}") for index in range(count)]
    try:
        options, warnings = await threads[0].call(partial(_prepare, spec.config))
        targets = [
            Target(spec.config.name, each.name, _client(each, options), options.concurrency)
            for each in options.addresses
        ]
    except BaseException:
        for thread in threads:
            thread.stop()
        raise
    pool = Pool(spec.config.name, targets)
    engines = [RemoteEngine(spec.config, options, pool, targets[0].client, thread) for thread in threads]
    for engine in engines:
        engine.warnings += warnings
    return [*engines]


def configuration(model: str, parameters: Mapping[str, str]) -> ModelConfigProto:
    """What a server says of the model that these parameters name. Blocking.

    Raises `InvalidArgument` for wrong parameters and `Unavailable` where no server can be asked.
    """
    options = read(model, parameters)
    reasons = []
    for address in options.addresses:
        try:
            return _fetch(address, options)
        except Failure as failure:
            reasons.append(f"{address.name}: {failure.reason}")
    raise errors.Unavailable(
        f"no server can be asked for the inputs and outputs of '{model}' ({'; '.join(reasons)}). List input and output "
        "in config.pbtxt to load it while the servers are away"
    )


def _prepare(config: ModelConfig) -> tuple[Options, tuple[str, ...]]:
    options = read(config.name, config.parameters)
    warnings = []
    for address in options.addresses:
        try:
            theirs = _fetch(address, options)
        except Failure as failure:
            warnings.append(
                f"remote:{address.name} does not say now whether it fits the configuration: {failure.reason}"
            )
        else:
            _check(config, theirs, address)
    return options, tuple(warnings)


def _check(config: ModelConfig, theirs: ModelConfigProto, address: Address) -> None:
    if theirs.model_transaction_policy.decoupled:
        raise errors.Unsupported(
            f"model '{theirs.name}' on {address.name} is decoupled, and a remote engine gives one answer to a request; "
            "call it there"
        )
    if config.max_batch_size and 0 < theirs.max_batch_size < config.max_batch_size:
        raise errors.InvalidArgument(
            f"model '{config.name}' has max_batch_size {config.max_batch_size}, and on {address.name} it is "
            f"{theirs.max_batch_size}; make it no larger in config.pbtxt"
        )
    lead = (-1,) if theirs.max_batch_size else ()
    io = ModelIO(_specs(theirs.input, lead), _specs(theirs.output, lead))
    plain = [tuple(replace(tensor, reshape=None) for tensor in each) for each in (config.inputs, config.outputs)]
    check_fit(replace(config, inputs=plain[0], outputs=plain[1]), io)


def _specs(tensors: ModelConfigProto, lead: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    types = tensors[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number if tensors else {}
    return tuple(
        TensorSpec(
            tensor.name,
            datatype(types[tensor.data_type].name),
            (*lead, *tensor.dims),
            optional=getattr(tensor, "optional", False),
        )
        for tensor in tensors
    )


def _fetch(address: Address, options: Options) -> ModelConfigProto:
    return (fetch_by_grpc if address.scheme.startswith("grpc") else fetch_by_http)(address, options)


def _client(address: Address, options: Options) -> Client:
    return GrpcClient(address, options) if address.scheme.startswith("grpc") else HttpClient(address, options)
