"""Locust users that speak HTTP: all JSON, and JSON with binary tensors. One keep-alive connection each (geventhttpclient)."""

from __future__ import annotations

from urllib.parse import urlsplit

from geventhttpclient import HTTPClient

from loadtest.bench import bodies
from loadtest.locust_users import InferUser
from loadtest.samples import Arrays, Sample


class RefusedError(Exception):
    """The server answered with an error."""


class _HttpUser(InferUser):
    abstract = True

    def connect(self) -> None:
        """One connection per user, as a browser or a service behind a pool of one would have."""
        url = urlsplit(self.host or "http://127.0.0.1:8000")
        self._client = HTTPClient(url.hostname or "127.0.0.1", url.port or 80, concurrency=1, network_timeout=30.0)
        # a photograph is 1.4 MB of JSON: encoded once, or the client would be what is measured
        self._encoded = None if self.fixed is None else self.wire(self.fixed)

    def on_stop(self) -> None:
        """Leave."""
        self._client.close()

    def wire(self, sample: Sample) -> bodies.Wire:
        """The request as bytes."""
        raise NotImplementedError

    def send(self, sample: Sample) -> Arrays:
        """Post and parse."""
        wire = self._encoded or self.wire(sample)
        response = self._client.post(wire.path, body=wire.body, headers=wire.headers)
        body = bytes(response.read())
        if response.status_code != 200:
            raise RefusedError(f"{response.status_code} {body[:150]!r}")
        length = response.get(bodies.HEADER_LENGTH)
        return bodies.parse_http(body, None if length is None else str(length))


class HttpJsonUser(_HttpUser):
    """Tensors as JSON numbers, both ways."""

    protocol = "HTTP JSON"

    def wire(self, sample: Sample) -> bodies.Wire:
        """All JSON."""
        return bodies.http_json(sample)


class HttpBinaryUser(_HttpUser):
    """Tensors as bytes after the JSON header, both ways."""

    protocol = "HTTP binary"

    def wire(self, sample: Sample) -> bodies.Wire:
        """JSON header and tensors."""
        return bodies.http_binary(sample)
