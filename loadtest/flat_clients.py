"""The soak's clients: pipelined HTTP/1.1 on shared connections, broken HTTP on connections of its own, gRPC; all in asyncio.

They are written for speed, not for manners: a burst of requests is one write, and an answer is judged from its bytes. Each client
takes requests from a shared iterator and counts what came back in a `Tally`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import islice

import grpc

from loadtest.flat_requests import HOST, Request

BURST = 16
PATIENCE = 30.0


@dataclass(slots=True)
class Tally:
    """What came back: per kind and status, and the first few things that should not have happened."""

    statuses: Counter[str] = field(default_factory=Counter)
    good_right: int = 0
    bad_refused: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def count(self, request: Request, status: str, fault: str) -> None:
        """File one answer; `fault` says what is wrong with it, if anything."""
        self.statuses[f"{request.kind}: {status}"] += 1
        if fault:
            self.wrong[f"{request.kind}: {fault}"] += 1
            if len(self.examples) < 20:
                self.examples.append(f"{request.kind}: {status}: {fault}")
        elif request.good:
            self.good_right += 1
        else:
            self.bad_refused += 1


def judge(request: Request, status: int, body: bytes) -> str:
    """What is wrong with an HTTP answer, or the empty text."""
    if request.good:
        if status != 200:
            return f"a good request was refused: {body[:200]!r}"
        return "" if body.endswith(request.want) and (request.want or _sums_hold(body)) else "wrong values"
    if not 400 <= status < 600:
        return "a bad request was accepted"
    try:
        text = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"not an error body: {body[:100]!r}"
    return "a trace in the error text" if "Traceback" in text else ""


def _sums_hold(body: bytes) -> bool:
    """The JSON answer to good_http's JSON request: sum and difference add up to twice the first input, a whole number."""
    outputs = {entry["name"]: entry["data"] for entry in json.loads(body)["outputs"]}
    pairs = list(zip(outputs["OUTPUT0"], outputs["OUTPUT1"], strict=True))
    return len(pairs) == 16 and all((total + difference) % 2 == 0 for total, difference in pairs)


class Answers:
    """Cuts a byte stream into HTTP/1.1 responses with a Content-Length."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def next(self) -> tuple[int, bytes, bool] | None:
        """Status, body and whether the server closes after it; None when the response is not complete."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = bytes(self._buffer[:end]).lower()
        length = 0
        at = head.find(b"\r\ncontent-length:")
        if at >= 0:
            length = int(head[at + 17 :].split(b"\r\n", 1)[0])
        stop = end + 4 + length
        if len(self._buffer) < stop:
            return None
        body = bytes(self._buffer[end + 4 : stop])
        del self._buffer[:stop]
        return int(head[9:12]), body, b"\r\nconnection: close" in head


async def _burst(port: int, requests: list[Request], tally: Tally, pipe: Pipe | None) -> Pipe | None:
    """Send requests in one write and judge the answers; what a closing server left unanswered is sent again."""
    while requests:
        pipe = pipe or await Pipe.open(port)
        pipe.writer.write(b"".join(request.data for request in requests))
        answered = 0
        async with asyncio.timeout(PATIENCE):
            async for status, body, last in pipe.read(len(requests)):
                tally.count(requests[answered], str(status), judge(requests[answered], status, body))
                answered += 1
                if last:
                    break
        if answered < len(requests):
            pipe.close()
            pipe = None
            if not answered:
                tally.count(requests[0], "closed", "the connection was closed without an answer")
                answered = 1
        requests = requests[answered:]
    return pipe


class Pipe:
    """One keep-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._answers = Answers()

    @classmethod
    async def open(cls, port: int) -> Pipe:
        """Connect."""
        reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 20)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # leave by reset: tens of thousands of connections in TIME_WAIT would use up the client's ports
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return cls(reader, writer)

    async def read(self, count: int) -> AsyncIterator[tuple[int, bytes, bool]]:
        """Up to `count` responses; fewer when the server closes."""
        for _ in range(count):
            while (answer := self._answers.next()) is None:
                try:
                    data = await self.reader.read(1 << 16)
                except ConnectionError:
                    return
                if not data:
                    return
                self._answers.feed(data)
            yield answer

    def close(self) -> None:
        """Leave."""
        self.writer.close()


async def pipeline(port: int, requests: Iterator[Request], tally: Tally) -> None:
    """Requests that share a connection, until there are no more."""
    pipe: Pipe | None = None
    while burst := list(islice(requests, BURST)):
        pipe = await _burst(port, burst, tally, pipe)
    if pipe:
        pipe.close()


async def alone(port: int, requests: Iterator[Request], tally: Tally) -> None:
    """Requests that break their connection: answered with an error, or closed; never a hang."""
    for request in requests:
        pipe = await Pipe.open(port)
        status, fault = "left", ""
        with contextlib.suppress(ConnectionError):
            pipe.writer.write(request.data)
            await pipe.writer.drain()
        if not request.hang_up:
            status, fault = "closed", ""
            try:
                async with asyncio.timeout(PATIENCE):
                    async for code, _, _ in pipe.read(1):
                        status, fault = str(code), "" if 400 <= code < 600 else "a bad request was accepted"
            except TimeoutError:
                fault = f"neither answered nor closed in {PATIENCE:g} s"
        tally.count(request, status, fault)
        pipe.close()


async def rpc(port: int, requests: Iterator[Request], tally: Tally) -> None:
    """gRPC requests, one after another on a channel of their own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"{HOST}:{port}", options=options) as channel:
        for request in requests:
            call = channel.unary_unary(request.method, request_serializer=bytes, response_deserializer=bytes)
            status, fault = "OK", ""
            try:
                answer = await call(request.data, timeout=request.timeout)
                if not request.good:
                    fault = "a bad request was accepted"
                elif not all(part in answer for part in (request.want[:64], request.want[64:])):
                    fault = "wrong values"
            except grpc.aio.AioRpcError as error:
                status = error.code().name
                broken = status in {"UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"}
                fault = f"{status}: {error.details()}" if request.good or broken else ""
            tally.count(request, status, fault)
