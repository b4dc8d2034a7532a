"""Locust user that speaks gRPC: grpcio's synchronous client, made to yield to gevent, one HTTP/2 connection each."""

from __future__ import annotations

from importlib import import_module

import grpc

from loadtest.bench import bodies
from loadtest.locust_users import InferUser
from loadtest.samples import Arrays, Sample


def prepare() -> None:
    """Make grpcio wait through gevent; must run before the first channel of the process."""
    import_module("grpc.experimental.gevent").init_gevent()


class GrpcUser(InferUser):
    """ModelInfer with raw contents."""

    protocol = "gRPC"

    def connect(self) -> None:
        """A connection of its own: grpcio would let users of one address share."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        self._channel = grpc.insecure_channel(self.environment.parsed_options.grpc_host, options=options)
        self._call = self._channel.unary_unary(bodies.GRPC_PATH, request_serializer=bytes, response_deserializer=bytes)
        self._encoded = None if self.fixed is None else bodies.grpc_message(self.fixed)

    def on_stop(self) -> None:
        """Leave."""
        self._channel.close()

    def send(self, sample: Sample) -> Arrays:
        """Call and parse."""
        return bodies.parse_grpc(self._call(self._encoded or bodies.grpc_message(sample), timeout=30))
