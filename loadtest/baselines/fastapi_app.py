"""Baseline (a): FastAPI, uvicorn and ONNX Runtime, one run per request, no batching.

It is what a careful engineer writes in an afternoon: raw bytes in and out (no JSON, no pydantic on the way), uvloop and
httptools, one session per model, and ONNX Runtime (which releases the GIL) on a thread pool of eight, the best of 1, 2, 8 and
starlette's own pool at 32 connections, so the event loop stays free. `--inline` runs on the event loop instead: some 10 % cheaper
for a tiny model, at the price that a large one stalls every other connection. `POST /infer/<model>` takes the input tensors of ONE row or more, concatenated in the order of the model's
inputs, and answers the outputs concatenated in the order of its outputs. `X-Shape` carries the shapes (`1,32;1,32;1,32`) where
a model leaves more than the batch open; without it the batch is found from the body's size.

    python -m loadtest.baselines.fastapi_app --repository model_repo --model add_sub --port 8080
"""

from __future__ import annotations

import argparse
import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray

from loadtest.record import cores
from loadtest.samples import model_file

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype("<f4"),
    "tensor(int64)": np.dtype("<i8"),
    "tensor(int32)": np.dtype("<i4"),
}

POOL = 8


class BadRequestError(ValueError):
    """The body does not fit the model's inputs."""


@dataclass(frozen=True, slots=True)
class Input:
    """One model input: its name, element type and shape without the batch (-1 where open)."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int, ...]


class Model:
    """One session and the bytes-to-bytes call around it."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # several requests run at once: spinning threads would take the cores from one another
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = [
            Input(entry.name, DTYPES[entry.type], tuple(dim if isinstance(dim, int) else -1 for dim in entry.shape[1:]))
            for entry in self.session.get_inputs()
        ]
        self._row_bytes = sum(i.dtype.itemsize * math.prod(i.dims) for i in self.inputs)
        self._fixed = all(dim >= 0 for i in self.inputs for dim in i.dims)

    def shapes(self, size: int, header: str | None) -> list[tuple[int, ...]]:
        """The shape of each input, from the header or, with fixed dims, from the size of the body."""
        if header:
            return [tuple(int(dim) for dim in shape.split(",")) for shape in header.split(";")]
        if not self._fixed or size == 0 or size % self._row_bytes:
            raise BadRequestError("the body does not fit the inputs")
        return [(size // self._row_bytes, *i.dims) for i in self.inputs]

    def __call__(self, body: bytes, header: str | None) -> bytes:
        """Run one request."""
        feeds: dict[str, NDArray[np.generic]] = {}
        offset = 0
        for entry, shape in zip(self.inputs, self.shapes(len(body), header), strict=True):
            count = math.prod(shape)
            feeds[entry.name] = np.frombuffer(body, entry.dtype, count, offset).reshape(shape)
            offset += count * entry.dtype.itemsize
        if offset != len(body):
            raise BadRequestError("the body does not fit the inputs")
        return b"".join(array.tobytes() for array in self.session.run(self.outputs, feeds))


def create_app(models: dict[str, Model], *, inline: bool = False) -> FastAPI:
    """The application: one route, and one for the ready check."""
    app = FastAPI()
    pool = ThreadPoolExecutor(POOL, thread_name_prefix="ort")

    @app.get("/ready")
    async def ready() -> dict[str, list[str]]:
        return {"models": sorted(models)}

    @app.post("/infer/{name}")
    async def infer(name: str, request: Request) -> Response:
        model = models.get(name)
        if model is None:
            return Response("unknown model", status_code=404)
        body, shape = await request.body(), request.headers.get("x-shape")
        try:
            if inline:
                answer = model(body, shape)
            else:
                answer = await asyncio.get_running_loop().run_in_executor(pool, model, body, shape)
        except (BadRequestError, ValueError) as error:
            return Response(str(error), status_code=400)
        return Response(answer, media_type="application/octet-stream")

    return app


def main() -> None:
    """Serve the models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repo"))
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=cores(), help="ORT threads of one run")
    parser.add_argument("--inline", action="store_true", help="run on the event loop, not on the pool")
    args = parser.parse_args()
    models = {name: Model(model_file(args.repository, name), args.threads) for name in args.model}
    app = create_app(models, inline=args.inline)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
