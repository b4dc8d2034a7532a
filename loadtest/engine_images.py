"""32 pictures in flight to the image classifier, each answer compared with ONNX Runtime's own.

A client for `loadtest.engine_faults`: its history has the picture's number for a tag, so that another picture's answer is seen.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtest import samples
from loadtest.bench import bodies
from loadtest.flat_clients import Answers
from loadtest.flat_requests import HOST, http
from loadtest.history import LOST, UNANSWERED, History, Record, Run

PICTURES = 8
_PATIENCE = 10.0  # seconds after its deadline until a request counts as unanswered
_CHUNK = 1 << 16


class Pictures:
    """Pictures that differ, as requests, and what is right for each."""

    def __init__(self, repository: Path, model: str, deadline_ms: float) -> None:
        """The right answers are of the file that is served from this repository."""
        picture = samples.sample(model).inputs["image"]
        shifted = [np.roll(picture, 28 * place, axis=3) for place in range(PICTURES)]
        file = samples.model_file(repository, model)
        self.requests: list[bytes] = []
        self._right: list[NDArray[np.generic]] = []
        for each in shifted:
            wire = bodies.http_binary(samples.Sample(model, {"image": np.ascontiguousarray(each)}))
            headers = {**wire.headers, "x-request-timeout-ms": f"{deadline_ms:g}"}
            self.requests.append(http(wire.path, wire.body, headers))
            (scores,) = samples.expected(file, {"image": each}).values()
            self._right.append(scores)

    def recognize(self, body: bytes) -> int | None:
        """Whose answer it is."""
        (scores,) = np.frombuffer(body[-self._right[0].nbytes :], self._right[0].dtype).reshape(1, 1, -1)
        close = [place for place, right in enumerate(self._right) if np.allclose(scores, right, 1e-3, 1e-3)]
        return close[0] if len(close) == 1 else None


class ImageClient:
    """Sends pictures in a closed loop; `run` it until `stop`."""

    def __init__(self, port: int, pictures: Pictures, deadline_ms: float, in_flight: int) -> None:
        self.history = History(Run("images", -1, deadline_ms), [])
        self._port = port
        self._pictures = pictures
        self._patience = deadline_ms / 1e3 + _PATIENCE
        self._in_flight = in_flight
        self._stopped = False
        self._next = 0

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True

    async def run(self) -> None:
        """Return when all that was sent is answered."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._in_flight):
                tasks.create_task(self._send())

    async def _send(self) -> None:
        while not self._stopped:
            reader, writer = await asyncio.open_connection(HOST, self._port, limit=_CHUNK)
            try:
                while not self._stopped and await self._ask(reader, writer):
                    pass
            finally:
                writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One picture; False when the connection is of no more use."""
        number = self._next
        self._next += 1
        tag = number % PICTURES
        sent = time.monotonic()
        answers = Answers()
        found = None
        try:
            async with asyncio.timeout(self._patience):
                writer.write(self._pictures.requests[tag])
                while (found := answers.next()) is None:
                    data = await reader.read(_CHUNK)
                    if not data:
                        break
                    answers.feed(data)
        except (TimeoutError, OSError) as problem:
            status = UNANSWERED if isinstance(problem, TimeoutError) else LOST
            self.history.records.append(Record(number, tag, sent, None, status))
            return False
        now = time.monotonic()
        if found is None:
            self.history.records.append(Record(number, tag, sent, None, LOST))
            return False
        status, body, last = found
        answer = self._pictures.recognize(body) if status == 200 else None
        text = "" if status == 200 else body[:300].decode(errors="replace")
        self.history.records.append(Record(number, tag, sent, now, status, answer, error=text))
        return not last
