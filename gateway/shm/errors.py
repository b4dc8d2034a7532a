"""What is wrong with a client's use of shared memory, in Triton's words (server `shared_memory_manager.cc`, `grpc_utils.h`).

A part of the table in `gateway/errors.py`, whose rows these are.
"""

from __future__ import annotations

from gateway.errors import AlreadyExists, Internal, InvalidArgument, NotFound, Unavailable, Unsupported


def reserved_region_key(name: str, key: str, prefix: str) -> InvalidArgument:
    """A shared memory object that is the server's own."""
    return InvalidArgument(
        f"cannot register shared memory region '{name}' with key '{key}' as the key contains the reserved prefix '{prefix}'"
    )


def region_exists(name: str) -> AlreadyExists:
    """A shared memory region of a name that another has."""
    return AlreadyExists(f"shared memory region '{name}' already in manager")


def region_out_of_bounds(name: str) -> InvalidArgument:
    """A shared memory region that is empty, or not within its object."""
    return InvalidArgument(f"failed to register shared memory region '{name}': invalid args")


def unknown_region(name: str) -> NotFound:
    """A tensor in a shared memory region that was not registered."""
    return NotFound(f"Unable to find shared memory region: '{name}'")


def unknown_region_of(kind: str, name: str) -> NotFound:
    """The status of a region of this kind that was not registered."""
    return NotFound(f"Unable to find {kind} shared memory region: '{name}'")


def bad_region_offset(name: str) -> InvalidArgument:
    """A tensor that begins behind the end of its shared memory region."""
    return InvalidArgument(f"Invalid offset for shared memory region: '{name}'")


def bad_region_end(name: str) -> InvalidArgument:
    """A tensor that ends behind the end of its shared memory region."""
    return InvalidArgument(f"Invalid offset + byte size for shared memory region: '{name}'")


def region_overflow(name: str, offset: int, size: int, most: int) -> InvalidArgument:
    """A tensor whose place in shared memory does not fit 64 bits."""
    return InvalidArgument(
        f"Integer overflow detected: byte_size ({size}) + offset ({offset}) exceeds maximum value ({most}) "
        f"for region '{name}'"
    )


def output_too_large(output: str, room: int, size: int) -> Internal:
    """An output that its place in shared memory does not hold."""
    return Internal(
        f"shared memory size specified with the request for output '{output}' ({room} bytes) should be at least "
        f"{size} bytes to hold the results"
    )


def no_place_size(tensor: str) -> InvalidArgument:
    """A tensor in shared memory without `shared_memory_byte_size`."""
    return InvalidArgument(
        f"'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor '{tensor}'"
    )


def no_place_region(tensor: str, parameter: str) -> InvalidArgument:
    """A parameter of a tensor in shared memory, without the region."""
    return InvalidArgument(
        f"'{parameter}' can not be specified without 'shared_memory_region' parameter for tensor '{tensor}'"
    )


def no_cuda_regions(name: str) -> Unavailable:
    """CUDA shared memory, which this server cannot open."""
    return Unavailable(f"failed to register CUDA shared memory region: '{name}', GPUs not supported")


def redis_memory_disabled() -> Unsupported:
    """Tensors in Redis, where no Redis was named for them."""
    return Unsupported(
        "Redis shared memory is disabled. Start the server with '--allow-client-shm=true --client-shm-redis=URL' to enable."
    )


def foreign_redis_key(name: str, key: str, prefix: str) -> InvalidArgument:
    """A key in Redis that is not for clients."""
    return InvalidArgument(
        f"cannot register shared memory region '{name}' with key '{key}': keys of clients begin with '{prefix}'"
    )


def redis_key_too_short(name: str, key: str, found: int, size: int) -> InvalidArgument:
    """An input that its key in Redis does not hold."""
    return InvalidArgument(
        f"key '{key}' of shared memory region '{name}' holds {found} bytes where the request says {size}; SET it before "
        "the request"
    )


def redis_memory_away() -> Unavailable:
    """Redis does not answer. Where it is is nothing for clients."""
    return Unavailable("the Redis of shared memory does not answer. The server's log has the cause")


def redis_memory_refused(name: str, key: str, why: str) -> InvalidArgument:
    """Redis does not do it: the key holds something else, there is no memory, or the user may not."""
    return InvalidArgument(f"Redis refuses key '{key}' of shared memory region '{name}': {why}")
