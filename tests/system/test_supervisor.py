"""Several processes on one machine: they share their ports and the work, and each may die or be told to go."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from gateway.engines.fake import Gate
from tests.system.process import ROOT, GatewayProcess, started, write_model

# The start of five processes takes a while on a machine that does something else as well.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

FLEET = ("--queue", "embedded", "--workers", "2", "--http-workers", "2")
BODY = json.dumps({"inputs": [{"name": "IN", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]})
INFER = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}".encode()


@pytest.fixture
def repository() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        write_model(Path(folder) / "repo", "m")
        yield Path(folder) / "repo"


@pytest.fixture
def fleet(repository: Path) -> Iterator[GatewayProcess]:
    with started("--model-repository", str(repository), *FLEET) as gateway:
        wait_served(gateway)
        yield gateway


def wait_served(gateway: GatewayProcess) -> None:
    """Until the processes are ready and both gateways have heard so: a dozen callers in a row find the model."""
    gateway.wait_for("ready", gateways=2, workers=2)
    found = 0
    while found < 12:
        try:
            gateway.get("/v2/models/m/ready")
            found += 1
        except urllib.error.HTTPError as not_yet:
            not_yet.close()
            found = 0


def children(gateway: GatewayProcess, role: str = "") -> list[psutil.Process]:
    """The processes below the supervisor, or those of a role, in the order of their numbers."""
    found = [child for child in psutil.Process(gateway.process.pid).children() if role in name_of(child)]
    return sorted(found, key=name_of)


def name_of(process: psutil.Process) -> str:
    words = process.cmdline()
    return words[words.index("--process-name") + 1] if "--process-name" in words else ""


def infer(gateway: GatewayProcess) -> None:
    """One inference over HTTP and one over gRPC, each on a connection of its own."""
    for module, port in ((triton_http, "http"), (triton_grpc, "grpc")):
        tensor = module.InferInput("IN", [1, 2], "FP32")
        tensor.set_data_from_numpy(np.array([[3, 4]], np.float32))
        with module.InferenceServerClient(f"127.0.0.1:{gateway.ports[port]}") as client:
            assert client.infer("m", [tensor]).as_numpy("OUT").tolist() == [[3, 4]]


def test_every_process_takes_part(fleet: GatewayProcess) -> None:
    callers = [socket.create_connection(("127.0.0.1", fleet.ports["http"])) for _ in range(24)]
    for caller in callers:
        caller.sendall(INFER)
    assert [caller.recv(1000)[:12] for caller in callers] == [b"HTTP/1.1 200"] * len(callers)
    for child in children(fleet, "gateway"):
        theirs = {each.raddr for each in child.net_connections() if each.status == psutil.CONN_ESTABLISHED}
        assert theirs & {caller.getsockname() for caller in callers}
    for caller in callers:
        caller.close()
    infer(fleet)
    sources = {json.loads(line)["source"] for line in fleet.lines if line.startswith("{")}
    assert sources == {"supervisor", "gateway-0", "gateway-1", "worker-0", "worker-1"}
    assert sum(line.startswith("MODEL ") for line in fleet.lines) == 1


@pytest.mark.parametrize("role", ["gateway", "worker"])
def test_a_process_that_is_killed_is_started_again(fleet: GatewayProcess, role: str) -> None:
    before = children(fleet)
    killed = children(fleet, role)[0]
    killed.kill()
    fleet.wait_for("process_died", name=f"{role}-0", exit_code=-signal.SIGKILL, restarts=1)
    infer(fleet)  # the other one serves
    fleet.wait_for("process_restarted", name=f"{role}-0", restarts=1)
    assert len(children(fleet, role)) == 2
    assert len(set(before) & set(children(fleet))) == len(before) - 1
    for _ in range(10):
        infer(fleet)


async def test_sigterm_of_a_gateway_under_load_is_not_noticed(fleet: GatewayProcess) -> None:
    async with load(fleet) as statuses:
        for index in (0, 1):
            children(fleet, "gateway")[index].terminate()
            await asyncio.to_thread(fleet.wait_for, "process_restarted", name=f"gateway-{index}")
    assert set(statuses) == {"200"}
    assert statuses.total() > 100


@asynccontextmanager
async def load(gateway: GatewayProcess) -> AsyncIterator[Counter[str]]:
    """Callers that make a connection for each request, and callers that keep theirs; what became of the requests."""
    statuses: Counter[str] = Counter()
    over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for keeps in (False, False, True, True):
            tasks.create_task(call(gateway.ports["http"], statuses, over, keeps=keeps))
            tasks.create_task(call_grpc(gateway.ports["grpc"], statuses, over, keeps=keeps))
        yield statuses
        over.set()


async def call(port: int, statuses: Counter[str], over: asyncio.Event, *, keeps: bool) -> None:
    while not over.is_set():
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError as problem:
            statuses[type(problem).__name__] += 1
            continue
        try:
            while await ask(reader, writer, statuses) and keeps and not over.is_set():
                pass
        except (OSError, EOFError) as problem:
            statuses[type(problem).__name__] += 1
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def call_grpc(port: int, statuses: Counter[str], over: asyncio.Event, *, keeps: bool) -> None:
    tensor = triton_grpc.InferInput("IN", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[3, 4]], np.float32))
    alone = [("grpc.use_local_subchannel_pool", 1)]  # else clients of one process share a connection
    while not over.is_set():
        async with triton_grpc_aio.InferenceServerClient(f"127.0.0.1:{port}", channel_args=alone) as client:
            while not over.is_set():
                try:
                    await client.infer("m", [tensor])
                    statuses["200"] += 1
                except InferenceServerException as problem:
                    statuses[str(problem)] += 1
                if not keeps:
                    break


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, statuses: Counter[str]) -> bool:
    """One request; whether the connection may be used again."""
    writer.write(INFER)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
    statuses[head.split()[1].decode()] += 1
    return b"connection: close" not in head


async def test_sigterm_answers_what_was_accepted_and_leaves_nothing_behind(repository: Path) -> None:
    write_model(repository, "m", gate=str(repository / "gate"))
    flags = ("--model-repository", str(repository), *FLEET, "--log-verbose", "1")
    with started(*flags) as gateway:
        # The runs that measure stop at the gate too.
        for worker in ("worker-0", "worker-1"):
            await asyncio.to_thread(gateway.wait_for, "measured", source=worker)
        await asyncio.to_thread(wait_served, gateway)
        below = children(gateway)
        async with Gate(repository / "gate") as gate, asyncio.TaskGroup() as tasks:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.ports["http"])
            writer.write(INFER)
            held = await gate.arrival()
            over_grpc = tasks.create_task(asyncio.to_thread(infer_grpc, gateway))
            second = await gate.arrival()
            gateway.process.send_signal(signal.SIGTERM)
            for source in ("gateway-0", "gateway-1"):
                await asyncio.to_thread(gateway.wait_for, "draining", source=source)
            held.release()
            second.release()
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            assert await over_grpc == [[3, 4]]
        writer.close()
        assert await asyncio.to_thread(gateway.process.wait, 20) == 0
        assert psutil.wait_procs(below, timeout=20)[1] == []


def infer_grpc(gateway: GatewayProcess) -> list[list[float]]:
    tensor = triton_grpc.InferInput("IN", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[3, 4]], np.float32))
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
        return client.infer("m", [tensor]).as_numpy("OUT").tolist()


def test_a_second_signal_ends_all_at_once(repository: Path) -> None:
    with started("--model-repository", str(repository), *FLEET) as gateway:
        gateway.wait_for("ready", gateways=2, workers=2)
        below = children(gateway)
        stopped = children(gateway, "gateway")[0]
        stopped.suspend()  # so that it does not end by itself
        gateway.process.send_signal(signal.SIGTERM)
        gateway.wait_for("draining", source="gateway-1")
        gateway.process.send_signal(signal.SIGTERM)
        gateway.wait_for("stop_forced", source="supervisor")
        assert gateway.process.wait(timeout=20) == 1
        assert psutil.wait_procs(below, timeout=20)[1] == []


def test_a_killed_supervisor_leaves_no_process_behind(fleet: GatewayProcess) -> None:
    below = children(fleet)
    assert len(below) == 5  # and Redis
    fleet.process.kill()
    assert psutil.wait_procs(below, timeout=20)[1] == []


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "serve", *FLEET, "--grpc-port", "0", "--metrics-port", "0", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=80, check=False)


def test_what_cannot_start_ends_with_its_message(repository: Path) -> None:
    done = run("--model-repository", str(repository / "nowhere"), "--http-port", "0")
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "process_cannot_start" in done.stderr
    assert "process_died" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_one_line_and_status_1(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--model-repository", str(repository), "--http-port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "process_" not in done.stderr
