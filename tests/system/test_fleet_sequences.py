"""Sequences over a fleet of real processes, by unmodified tritonclient: order, death of the worker, and its stop."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from tests.python_support import write
from tests.sequence_support import FLEET, wait_served
from tests.system.process import GatewayProcess, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

HANGS = -1.0
CODE = """
def initialize(self, args):
    self.sums = {}
    self.folder = args["model_repository"]

def execute(self, requests):
    import os, time
    responses = []
    for request in requests:
        value = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
        of = request.correlation_id()
        if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            self.sums[of] = 0
        if (value < 0).any():
            open(os.path.join(self.folder, "hangs"), "w").close()
            time.sleep(60)
        self.sums[of] += value
        out = pb_utils.Tensor("OUT", self.sums[of].astype(np.float64))
        pid = pb_utils.Tensor("PID", np.full(value.shape, os.getpid(), np.int64))
        responses.append(pb_utils.InferenceResponse([out, pid]))
    return responses
"""
CONFIG = """
backend: "python" max_batch_size: 4
input { name: "IN" data_type: TYPE_FP64 dims: [ 1 ] }
output { name: "OUT" data_type: TYPE_FP64 dims: [ 1 ] }
output { name: "PID" data_type: TYPE_INT64 dims: [ 1 ] }
sequence_batching { oldest { max_candidate_sequences: 8 } max_sequence_idle_microseconds: 60000000 }
instance_group { kind: KIND_CPU count: 1 }
"""
START, END = {"sequence_start": True}, {"sequence_end": True}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gw") as path:
        write(Path(path) / "sums", CODE, CONFIG)
        yield Path(path)


@pytest.fixture
def fleet(folder: Path) -> Iterator[GatewayProcess]:
    with started("--model-repository", str(folder), "--allow-python-models", *FLEET) as gateway:
        wait_served(gateway, "sums")
        yield gateway


def given(library: Any, value: float) -> list[Any]:
    tensor = library.InferInput("IN", [1, 1], "FP64")
    tensor.set_data_from_numpy(np.array([[value]], np.float64))
    return [tensor]


class Client:
    """One tritonclient, which asks for the sum of a sequence and who has it."""

    def __init__(self, gateway: GatewayProcess, wire: str) -> None:
        self.library = tritonclient.http if wire == "http" else tritonclient.grpc
        self.client = self.library.InferenceServerClient(f"127.0.0.1:{gateway.ports[wire]}")

    def say(self, of: int | str, value: float, **flags: bool) -> tuple[float, int]:
        answer = self.infer(of, value, **flags)
        return answer.as_numpy("OUT").item(), worker_of(answer.as_numpy("PID").item())

    def infer(self, of: int | str, value: float, **flags: bool) -> Any:
        return self.client.infer("sums", given(self.library, value), sequence_id=of, **flags)

    def say_for_ever(self, of: int | str) -> None:
        while True:
            self.say(of, 1)

    def lost(self, of: int | str) -> None:
        with pytest.raises(InferenceServerException) as caught:
            self.say(of, 1)
        is_lost(caught.value, of)


def is_lost(error: InferenceServerException, of: int | str) -> None:
    assert error.message() == (
        f"sequence {of} of model 'sums' was lost with the worker that ran it, or on the way to it. Begin it again with the "
        "START flag"
    )
    assert error.status() in ("409", "StatusCode.ABORTED")


def begun_at_two_workers(client: Client) -> dict[int, list[int | str]]:
    """Sequences that have their start and one request, by the process that has them: some at each of two."""
    found: dict[int, list[int | str]] = {}
    for number in range(1, 40):
        of = number if number % 2 else f"sequence {number}"
        _, pid = client.say(of, number, **START)
        assert client.say(of, 1) == (number + 1, pid)
        found.setdefault(pid, []).append(of)
        if len(found) == 2 and min(map(len, found.values())) > 1:
            return found
        if len(found) == 1 and number > 16:
            raise AssertionError("one worker has begun more sequences than it has places for")
    raise AssertionError(found)


@pytest.mark.parametrize("wire", ["http", "grpc"])
def test_a_killed_worker_takes_its_sequences_with_it_and_nothing_else(
    fleet: GatewayProcess, folder: Path, wire: str
) -> None:
    client = Client(fleet, wire)
    (doomed, lost), (other, safe) = begun_at_two_workers(client).items()
    with ThreadPoolExecutor() as pool:
        in_flight = pool.submit(Client(fleet, wire).say, lost[0], HANGS)
        while not (folder / "sums" / "hangs").exists():
            time.sleep(0.01)
        os.kill(doomed, signal.SIGKILL)
        client.lost(lost[1])
        with pytest.raises(InferenceServerException) as caught:
            in_flight.result(30)
        is_lost(caught.value, lost[0])
    for of in lost[:2]:
        client.lost(of)
        assert client.say(of, 5, **START)[0] == 5  # and not what it was before
        assert client.say(of, 6, **END)[0] == 11
    for of in safe:
        total, pid = client.say(of, 1)
        assert pid == other
        assert total == client.say(of, 0)[0]
    assert 'reason="sequence_lost"' in metrics(fleet)


def test_whatever_happens_to_workers_no_sequence_goes_on_from_another_state(fleet: GatewayProcess) -> None:
    """Every answer is the sum of all that was said since the START before it, with no error in between."""
    until = time.monotonic() + 20
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(add_up, fleet, number, until) for number in range(8)]
        time.sleep(3)  # of work, here and below
        worker(fleet, "worker-0").kill()
        while sum('"model_ready"' in line and '"worker-0"' in line for line in fleet.lines) < 2:
            time.sleep(0.1)
        time.sleep(1)
        taken_for_dead = worker(fleet, "worker-1")
        taken_for_dead.suspend()
        time.sleep(3)
        taken_for_dead.resume()
        told = [client.result(60) for client in clients]
    assert sum(answered for answered, _ in told) > 200
    assert sum(lost for _, lost in told) > 0


def worker(fleet: GatewayProcess, name: str) -> psutil.Process:
    return next(each for each in psutil.Process(fleet.process.pid).children() if name in each.cmdline())


ENDS = ("Begin it again", "must specify the START flag", "no live worker holds it", "has no available versions")


def add_up(fleet: GatewayProcess, number: int, until: float) -> tuple[int, int]:
    """Say numbers of a sequence, and begin it again after each error; returns how many were answered, and lost."""
    clients = [Client(fleet, wire) for wire in ("http", "grpc")]
    of = number if number % 2 else f"client {number}"
    total, said, answered, lost = 0.0, 0, 0, 0
    while time.monotonic() < until:
        said += 1
        begins = total == 0
        try:
            found = clients[said % 2].infer(of, said, sequence_start=begins).as_numpy("OUT").item()
        except InferenceServerException as error:
            if not any(words in error.message() for words in ENDS):
                raise
            lost += 1
            total = 0.0
            continue
        total += said
        assert found == total
        answered += 1
        if answered % 20 == 0:
            total = 0.0
    return answered, lost


def test_a_worker_that_stops_ends_its_sequences_and_others_begin_them_again(fleet: GatewayProcess) -> None:
    client = Client(fleet, "grpc")
    (leaver, lost), (other, safe) = begun_at_two_workers(client).items()
    os.kill(leaver, signal.SIGTERM)
    fleet.wait_for("draining", source=name_of(leaver))
    with pytest.raises(InferenceServerException) as caught:
        client.say_for_ever(lost[0])  # what comes before the gateways have heard of it is answered
    is_lost(caught.value, lost[0])
    assert client.say(lost[0], 5, **START)[0] == 5
    assert client.say(safe[0], 0)[1] == other


def worker_of(pid: int) -> int:
    """The worker whose Python model this process runs."""
    process = psutil.Process(pid)
    return next(each.pid for each in (process, *process.parents()) if "--process-name" in each.cmdline())


def name_of(pid: int) -> str:
    words = psutil.Process(pid).cmdline()
    return words[words.index("--process-name") + 1]


def metrics(fleet: GatewayProcess) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{fleet.ports['metrics']}/metrics", timeout=20) as reply:
        return reply.read().decode()


def test_a_stream_and_asynchronous_clients_keep_the_order(fleet: GatewayProcess) -> None:
    steps = 40
    streamed = stream(fleet, [1, "two", 3], steps)
    asked = asyncio.run(ask_all(fleet, steps))
    wanted = np.cumsum(np.arange(1, steps + 1, dtype=np.float64)).tolist()
    assert streamed == {"1": wanted, "two": wanted, "3": wanted}
    assert asked == [wanted] * 4
    assert ended(fleet) == 3 + 4


def ended(fleet: GatewayProcess) -> float:
    name = 'gateway_sequences_ended_total{model="sums",version="1",reason="ended"} '
    (line,) = [line for line in metrics(fleet).splitlines() if line.startswith(name)]
    return float(line.removeprefix(name))


def stream(fleet: GatewayProcess, ids: list[int | str], steps: int) -> dict[str, list[float]]:
    """What one gRPC stream answers of these sequences, all of whose requests are sent at once."""
    answers: queue.Queue[Any] = queue.Queue()
    found: dict[str, list[float]] = {str(of): [] for of in ids}
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{fleet.ports['grpc']}") as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        for step in range(1, steps + 1):
            for of in ids:
                client.async_stream_infer(
                    "sums", given(tritonclient.grpc, step), request_id=str(of), sequence_id=of,
                    sequence_start=step == 1, sequence_end=step == steps,
                )  # fmt: skip
        for _ in range(len(ids) * steps):
            answer = answers.get(timeout=30)
            assert not isinstance(answer, Exception), str(answer)
            found[answer.get_response().id].append(answer.as_numpy("OUT").item())
        client.stop_stream()
    return found


async def ask_all(fleet: GatewayProcess, steps: int) -> list[list[float]]:
    http = tritonclient.http.aio.InferenceServerClient(f"127.0.0.1:{fleet.ports['http']}")
    grpc = tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{fleet.ports['grpc']}")
    async with http, grpc:
        return await asyncio.gather(
            say_all(http, tritonclient.http, "by http", steps),
            say_all(http, tritonclient.http, 20, steps),
            say_all(grpc, tritonclient.grpc, "by grpc", steps),
            say_all(grpc, tritonclient.grpc, 21, steps),
        )


async def say_all(client: Any, library: Any, of: int | str, steps: int) -> list[float]:
    found = []
    for step in range(1, steps + 1):
        answer = await client.infer(
            "sums", given(library, step), sequence_id=of, sequence_start=step == 1, sequence_end=step == steps
        )
        found.append(answer.as_numpy("OUT").item())
    return found
