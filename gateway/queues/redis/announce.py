"""What a process tells the fleet of itself: that it is alive, what it holds, and how much it can take.

The announcement is small and written every half second; what it holds (with whole model configurations) is written
when it changes, under a digest that the announcement carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from gateway.config.model import ModelConfig
from gateway.queues.base import Capacity, InstanceState, PoolState, VersionState


class Announcement(msgspec.Struct, array_like=True, gc=False):
    """One process as others see it. `capacity` and `rows` are by lane, as `model/version`."""

    role: str
    host: str  # names the /dev/shm it has; empty for none
    reads: int  # the newest message version it understands
    leaving: bool
    digest: bytes
    capacity: dict[str, Capacity] = {}
    rows: dict[str, int] = {}  # of the requests it sent that are not answered
    number: int = 0  # of its announcements


class _Version(msgspec.Struct, array_like=True, gc=False):
    version: str
    state: str
    reason: str
    config: Any
    proto: bytes
    instances: list[tuple[str, str]]
    epoch: int = 0
    digest: str = ""
    artefacts: list[tuple[str, str]] = []  # precision and name, of each instance
    links: list[tuple[str, str]] = []  # name, and why it is not the first, of each instance


class _Pool(msgspec.Struct, array_like=True, gc=False):
    model: str
    reason: str
    versions: list[_Version]


class _Holding(msgspec.Struct, array_like=True, gc=False):
    pools: list[_Pool]
    names: list[str]  # of the models in its repository


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Announcement).decode
_decode_holding = msgspec.msgpack.Decoder(_Holding).decode


def read_announcement(data: bytes) -> Announcement | None:
    """None for one that another release wrote in another way."""
    try:
        return _decode(data)
    except msgspec.DecodeError:
        return None


def pack_holding(pools: Iterable[PoolState], names: Iterable[str]) -> bytes:
    """Everything a worker holds, and the names of what it could load."""
    return encode(_Holding([_pool(pool) for pool in pools], sorted(names)))


def read_holding(data: bytes) -> tuple[dict[str, PoolState], tuple[str, ...]] | None:
    """None for one that another release wrote in another way."""
    try:
        holding = _decode_holding(data)
        return {pool.model: _read_pool(pool) for pool in holding.pools}, tuple(holding.names)
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError):
        return None


def digest(data: bytes) -> bytes:
    """Names a holding by its content."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _pool(pool: PoolState) -> _Pool:
    return _Pool(pool.model, pool.reason, [_version(state) for state in pool.versions])


def _version(state: VersionState) -> _Version:
    config, proto = state.config, b""
    if config is not None and config.proto is not None:
        proto = config.proto.SerializeToString()
        config = replace(config, proto=None)
    instances = [(each.device, each.provider) for each in state.instances]
    artefacts = [(each.precision, each.artefact) for each in state.instances]
    links = [(each.link, each.reason) for each in state.instances]
    return _Version(
        state.version, state.state, state.reason, config, proto, instances, state.epoch, state.digest, artefacts, links
    )


def _read_pool(pool: _Pool) -> PoolState:
    return PoolState(pool.model, tuple(_read_version(each) for each in pool.versions), pool.reason)


def _read_version(found: _Version) -> VersionState:
    config = None if found.config is None else msgspec.convert(found.config, ModelConfig)
    if config is not None and found.proto:
        config = replace(config, proto=_config_message(found.proto))
    # A process of the release before says nothing of them.
    unknown = [("", "")] * len(found.instances)
    artefacts, links = found.artefacts or unknown, found.links or unknown
    instances = tuple(
        InstanceState(*instance, *artefact, *link)
        for instance, artefact, link in zip(found.instances, artefacts, links, strict=True)
    )
    return VersionState(
        found.version, found.state, found.reason, config, instances, epoch=found.epoch, digest=found.digest
    )


def _config_message(data: bytes) -> Any:
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2.ModelConfig.FromString(data)


_BEST = ("READY", "LOADING", "UNLOADING", "UNAVAILABLE")


def merge(model: str, pools: Mapping[str, PoolState]) -> PoolState:
    """One model as the whole fleet holds it: a version is as ready as its readiest worker has it."""
    versions: dict[str, VersionState] = {}
    for process in sorted(pools):
        for state in pools[process].versions:
            known = versions.get(state.version)
            versions[state.version] = state if known is None else _better(known, state)
    reason = next((pool.reason for pool in pools.values() if pool.reason), "")
    ordered = tuple(versions[version] for version in sorted(versions, key=int))
    return PoolState(model, ordered, "" if ordered else reason)


def _better(known: VersionState, other: VersionState) -> VersionState:
    first, second = sorted((known, other), key=lambda state: _BEST.index(state.state))
    first = replace(first, epoch=max(known.epoch, other.epoch))
    if first.state != "READY" or second.state != "READY":
        return first
    # Workers that compute different things: nobody knows whose answer a request will get.
    digest = first.digest if first.digest == second.digest else ""
    return replace(first, instances=first.instances + second.instances, digest=digest)
