"""The gRPC listener's life: binding, TLS, stopping without losing an answer, and a front that fails."""

import asyncio
import socket
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from gateway.service.controls import Controls
from gateway.transport.grpc import GrpcOptions, Keepalive, Tls
from gateway.transport.grpc.calls import Calls
from gateway.transport.grpc.native import native_front
from gateway.transport.grpc.server import GrpcServer
from tests.api.grpc_support import IMPLEMENTATIONS, failure, message, serving
from tests.support import background, settle

STOPPING = (
    grpc.StatusCode.UNAVAILABLE,
    "GRPC server is shutting down and has stopped accepting new requests.",
)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        pytest.importorskip("pygrpc_native")
    return request.param


# --- binding


async def test_a_used_port_is_refused_with_its_name(implementation):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}.*--grpc-port"):
            async with serving(implementation, port=port):
                pass


async def test_two_servers_do_not_share_a_port(implementation):
    async with serving(implementation) as first:
        with pytest.raises(OSError, match="cannot listen"):
            async with serving(implementation, port=first.server.port):
                pass


async def test_servers_share_a_port_if_both_say_so(implementation):
    async with serving(implementation, share=True) as leaving:
        port = leaving.server.port
        async with serving(implementation, port=port, share=True):
            leaving.stop.set()
            await asyncio.wait({leaving.task})
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                assert (await stub.ModelInfer(message("shared"))).id == "shared"


async def test_a_shared_port_is_refused_to_one_that_does_not_share(implementation):
    async with serving(implementation, share=True) as first:
        with pytest.raises(OSError, match="cannot listen"):
            async with serving(implementation, port=first.server.port):
                pass


@pytest.mark.slow
async def test_a_server_that_leaves_loses_no_call_of_its_clients(implementation):
    answered = []

    async def call(stub) -> None:
        while not over.is_set():
            answered.append((await stub.ModelInfer(message("m"))).id)

    over = asyncio.Event()
    async with (
        serving(implementation, share=True) as leaving,
        grpc.aio.insecure_channel(leaving.url) as channel,
        asyncio.TaskGroup() as tasks,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ModelInfer(message("first"))).id == "first"
        callers = [tasks.create_task(call(stub)) for _ in range(4)]
        left = tasks.create_task(leaving.server.leave())
        await settle()  # the next one is opened after those of this process were told to turn callers away
        async with serving(implementation, port=leaving.server.port, share=True):
            await left
            leaving.stop.set()
            await asyncio.wait({leaving.task})
            before = len(answered)
            while len(answered) < before + 20:
                await settle()
            over.set()
            await asyncio.wait(callers)
    assert all(caller.exception() is None for caller in callers)


async def test_a_call_that_runs_when_its_server_leaves_is_answered(implementation, monkeypatch):
    monkeypatch.setattr("gateway.transport.grpc.server._QUIET", 0.01)
    async with serving(implementation, share=True) as running, grpc.aio.insecure_channel(running.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        running.model.hold = True
        async with background(infer(stub)) as (caller,):
            job = await running.model.held.get()
            await running.server.leave()
            assert not caller.done()
            running.model.echo(job)
            assert await caller == "held"


async def infer(stub) -> str:
    return (await stub.ModelInfer(message("held"))).id


async def test_ipv6(implementation):
    async with (
        serving(implementation, host="::1") as running,
        grpc.aio.insecure_channel(f"[::1]:{running.server.port}") as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ModelInfer(message("six"))).id == "six"
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live


def test_the_front_serves_only_what_it_can():
    def implementation(**options) -> str:
        return GrpcServer(SimpleNamespace(controls=Controls()), None, None, GrpcOptions(**options)).implementation

    pytest.importorskip("pygrpc_native")
    assert implementation() == "native"
    assert implementation(native=False) == "grpcio"
    assert implementation(tls=Tls(Path("c"), Path("k"))) == "grpcio"
    assert implementation(keepalive=Keepalive(max_connection_age_ms=1000)) == "grpcio"


# --- TLS


@pytest.fixture(scope="module")
def pem(tmp_path_factory) -> Path:
    """A folder with a self-signed certificate for localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", *files],
        check=True,
        capture_output=True,
    )
    return folder


async def test_tls(pem):
    tls = Tls(pem / "cert.pem", pem / "key.pem")
    credentials = grpc.ssl_channel_credentials((pem / "cert.pem").read_bytes())
    async with serving("native", tls=tls) as running, grpc.aio.secure_channel(running.url, credentials) as channel:
        assert running.server.implementation == "grpcio"
        assert (await service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message("s"))).id == "s"


async def test_mutual_tls(pem):
    cert, key = (pem / "cert.pem").read_bytes(), (pem / "key.pem").read_bytes()
    tls = Tls(pem / "cert.pem", pem / "key.pem", client_root=pem / "cert.pem")
    async with serving("grpcio", tls=tls) as running:
        known = grpc.ssl_channel_credentials(cert, key, cert)
        async with grpc.aio.secure_channel(running.url, known) as channel:
            assert (await service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message("s"))).id == "s"
        async with grpc.aio.secure_channel(running.url, grpc.ssl_channel_credentials(cert)) as channel:
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message())
            assert (await failure(call))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_tls_file_that_is_missing(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.pem"):
        async with serving("grpcio", tls=Tls(tmp_path / "nowhere.pem", tmp_path / "nowhere.pem")):
            pass


# --- stopping


async def test_a_stop_answers_what_was_accepted_and_refuses_the_rest(implementation):
    async with serving(implementation) as running, running.stub() as stub:
        running.model.hold = True
        accepted = [stub.ModelInfer(message(str(i))) for i in range(20)]
        jobs = [await running.model.held.get() for _ in accepted]
        running.stop.set()
        await settle()
        assert await failure(stub.ModelInfer(message("late"))) == STOPPING
        assert await failure(stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))) == STOPPING
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        for job in jobs:
            running.model.echo(job)
        assert [(await call).id for call in accepted] == [str(i) for i in range(20)]
        await running.task


async def test_a_stop_sends_large_answers_to_their_end(implementation):
    size = 4 << 20
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(size * 4)])
    request.inputs.add(name="IN", datatype="FP32", shape=[1, size])
    async with (
        serving(implementation) as running,
        running.channel(options=[("grpc.max_receive_message_length", -1)]) as channel,
    ):
        running.model.hold = True
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        running.model.echo(await running.model.held.get())
        running.stop.set()
        assert len((await call).raw_output_contents[0]) == size * 4


async def test_a_stop_ends_a_stream_when_its_requests_are_answered(implementation):
    async with serving(implementation) as running, running.stub() as stub:
        running.model.hold = True
        stream, idle = stub.ModelStreamInfer(), stub.ModelStreamInfer()
        await idle.write(message("done"))
        running.model.echo(await running.model.held.get())
        assert (await idle.read()).infer_response.id == "done"
        await stream.write(message("held"))
        job = await running.model.held.get()
        running.stop.set()
        assert await failure(idle.read()) == STOPPING
        running.model.echo(job)
        assert (await stream.read()).infer_response.id == "held"
        assert await failure(stream.read()) == STOPPING
        await running.task


async def test_a_stop_ends_an_open_reflection(implementation):
    async with serving(implementation, grace=60.0) as running, running.channel() as channel:
        stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await stream.read()
        running.stop.set()
        await running.task


async def test_a_stop_waits_no_longer_than_its_grace(implementation):
    async with serving(implementation, grace=0.05) as running, running.stub() as stub:
        running.model.hold = True
        call = stub.ModelInfer(message("never"))
        job = await running.model.held.get()
        running.stop.set()
        assert (await failure(call))[0] in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert await running.ended.get() == "never"
        assert job.done


async def test_a_cancelled_stop_is_over_at_once(implementation):
    async with serving(implementation, grace=60.0) as running, running.stub() as stub:
        running.model.hold = True
        call = stub.ModelInfer(message("never"))
        await running.model.held.get()
        running.stop.set()
        await settle()
        running.task.cancel()
        assert (await failure(call))[0] in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert await running.ended.get() == "never"


# --- a front that fails


async def test_a_front_that_dies_ends_the_server(monkeypatch):
    native = pytest.importorskip("pygrpc_native")
    fronts = []

    def remembered(*arguments, **options):
        fronts.append(native_front(*arguments, **options))
        return fronts[0]

    native_front = native.NativeGrpcFront
    monkeypatch.setattr(native, "NativeGrpcFront", remembered)
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the server ends, and with it the block
        async with serving("native") as running:
            fronts[0].close()
            await asyncio.wait({running.task})
    assert caught.group_contains(RuntimeError, match="the native gRPC front stopped by itself")


def test_a_loop_that_is_closed_under_a_front_closes_the_front():
    pytest.importorskip("pygrpc_native")
    loop = asyncio.new_event_loop()
    front = native_front("127.0.0.1:0", Calls(None, None, GrpcOptions()), GrpcOptions())

    async def start():
        started = await front.__aenter__()
        started.start("/nowhere")
        return started

    started = loop.run_until_complete(start())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    with grpc.insecure_channel(f"127.0.0.1:{started.port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    for thread in threading.enumerate():
        if thread.name == "grpc-front":
            thread.join(10)
            assert not thread.is_alive()
