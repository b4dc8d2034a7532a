"""The remote engine against servers that misbehave, and against gateways: over gRPC and HTTP, all the same."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import time
import weakref
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gateway import engines, errors
from gateway.app import Gateway, running
from gateway.config.settings import Settings
from gateway.engines import remote
from gateway.engines.base import EngineSpec
from gateway.repository import Repository
from gateway.types import InferRequest, InferResponse
from loadtest.fault_proxy import FaultProxy
from tests.remote_support import CONFIG, SCHEMES, Refusal, Script, ask, asking, config
from tests.support import request, settle

pytestmark = pytest.mark.slow

both = pytest.mark.parametrize("scheme", SCHEMES)


@asynccontextmanager
async def scripted(scheme: str, *answers: Refusal, **more):
    script = Script(scheme)
    script.answers.extend(answers)
    async with script.serving(), asking(script.url, **more) as engine:
        yield script, engine


async def refused(asked) -> errors.GatewayError:
    with pytest.raises(errors.GatewayError) as problem:
        await asked
    return problem.value


# --- what is sent


@both
async def test_the_rows_of_a_batch_go_out_as_one_request(scheme: str) -> None:
    async with scripted(scheme) as (script, engine):
        result = await ask(engine, request(rows=2), request(rows=3))
    assert [said.rows for said in script.got] == [5]
    assert result.parameters == {"engine": f"remote:127.0.0.1:{script.port}"}
    assert result.started_ns <= result.stacked_ns <= result.finished_ns


@both
async def test_requests_with_parameters_of_their_own_go_apart(scheme: str) -> None:
    red, blue = {"colour": "red", "timeout": 5}, {"colour": "blue", "n": 3, "share": 0.5, "yes": True}
    batch = [request(parameters=red, rows=2), request(parameters={"colour": "red"}), request(parameters=blue)]
    async with scripted(scheme) as (script, engine):
        await ask(engine, *batch)
        await ask(engine, request(parameters=blue, id="mine"))
    assert sorted(said.rows for said in script.got[:2]) == [1, 3]
    for said in script.got:
        said.parameters.pop("binary_data_output", None)
        assert said.parameters == ({"colour": "red"} if said.rows == 3 else blue)
    assert [said.id for said in script.got] == ["", "", "mine"]


@both
async def test_the_deadline_travels_a_little_early(scheme: str) -> None:
    async with scripted(scheme) as (script, engine):
        await ask(engine)
        now = time.monotonic()
        await ask(engine, request(deadline=now + 5.0), request(deadline=now + 2.0))
        await ask(engine, request(deadline=now + 5.0), request(deadline=None))
    first, second, third = script.got
    assert "timeout" not in {*first.parameters, *third.parameters}
    assert 4.0e6 < second.parameters["timeout"] < 5.0e6
    if scheme == "grpc":
        assert second.seconds is not None
        assert 4.0 < second.seconds < 5.0
    else:
        assert 4000 < float(second.metadata["x-request-timeout-ms"]) < 5000


@both
async def test_a_batch_whose_deadline_is_over_is_not_sent(scheme: str) -> None:
    async with scripted(scheme) as (script, engine):
        error = await refused(ask(engine, request(deadline=time.monotonic())))
    assert isinstance(error, errors.DeadlineExceeded)
    assert script.got == []


@both
async def test_shapes_are_those_that_clients_see(scheme: str) -> None:
    reshaped = CONFIG.format(backend="remote").replace("dims: 2", "dims: 2 reshape { shape: [ 2, 1 ] }", 1)
    async with scripted(scheme, text=reshaped) as (script, engine):
        await ask(engine, request(rows=3), inner=(2, 1))
    assert [said.rows for said in script.got] == [3]


@both
async def test_numbers_in_place_of_bytes_are_understood(scheme: str) -> None:
    async with scripted(scheme) as (script, engine):
        script.binary = False
        await ask(engine, request(rows=3))


# --- what comes back instead of an answer


@both
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidArgument),
        (404, errors.Unavailable),
        (500, errors.Internal),
        (501, errors.Unavailable),
        (504, errors.DeadlineExceeded),
    ],
)
async def test_an_error_is_its_row_of_the_table(scheme: str, status: int, kind: type[errors.GatewayError]) -> None:
    async with scripted(scheme, Refusal(status), Refusal(status)) as (_, engine):
        error = await refused(ask(engine, request()))
        assert type(error) is kind


@both
@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize(("status", "kind"), [(429, errors.Overloaded), (503, errors.Unavailable)])
async def test_a_busy_server_is_left_alone_for_as_long_as_it_says(
    scheme: str, status: int, kind: type[errors.GatewayError], details: bool
) -> None:
    async with scripted(scheme, Refusal(status, "busy", 60, details=details and scheme == "grpc")) as (script, engine):
        error = await refused(ask(engine, request()))
        assert type(error) is kind
        assert error.retry_after == 0.06
        error = await refused(ask(engine, request()))
        assert isinstance(error, errors.Unavailable)
        assert len(script.got) == 1
        await asyncio.sleep(0.07)  # as any client would that honours Retry-After
        await ask(engine, request())


@both
async def test_a_refusal_that_another_server_makes_good_is_nobodys_loss(scheme: str) -> None:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Script(scheme).serving()) for _ in range(2)]
        engine = await stack.enter_async_context(asking(*(each.url for each in servers)))
        servers[0].answers.append(Refusal(503, "draining"))
        for _ in range(6):
            await ask(engine, request())
        assert [len(each.got) > 1 for each in servers] == [True, True]


@both
async def test_a_client_mistake_is_not_sent_again(scheme: str) -> None:
    async with scripted(scheme, Refusal(400), Refusal(400)) as (script, engine):
        await refused(ask(engine, request()))
        assert len(script.got) == 1


@both
async def test_an_error_is_gone_when_it_was_told(scheme: str) -> None:
    """Else each would stay until a garbage collection, with all of its request."""
    async with scripted(scheme, *[Refusal(status) for status in (400, 500, 503, 503)]) as (script, engine):
        left: list[weakref.ref[errors.GatewayError]] = []
        gc.disable()
        try:
            for number in range(5):
                if number == 4:
                    script.release.clear()
                try:
                    await ask(engine, request(deadline=time.monotonic() + (0.1 if number == 4 else 5.0)))
                except errors.GatewayError as error:
                    left.append(weakref.ref(error))
            await settle()
            assert [type(each()) for each in left if each() is not None] == []
            assert len(left) >= 4
        finally:
            gc.enable()
            script.release.set()


@both
async def test_a_server_that_comes_back_is_asked_again(scheme: str) -> None:
    script = Script(scheme)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(script.serving())
        proxy = await stack.enter_async_context(FaultProxy(f"127.0.0.1:{script.port}"))
        engine = await stack.enter_async_context(asking(f"{scheme}://{proxy.address}"))
        await ask(engine, request())
        proxy.refuse = True
        proxy.reset()
        for _ in range(5):
            error = await refused(ask(engine, request()))
            assert isinstance(error, errors.Unavailable)
            assert error.retry_after is not None
            assert 0 < error.retry_after <= 1.0
        proxy.refuse = False
        async with asyncio.timeout(5):
            while True:
                try:
                    await ask(engine, request())
                    break
                except errors.Unavailable as error:
                    await asyncio.sleep(error.retry_after or 0)


@both
async def test_one_broken_connection_costs_nobody_an_answer(scheme: str) -> None:
    script = Script(scheme)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(script.serving())
        proxy = await stack.enter_async_context(FaultProxy(f"127.0.0.1:{script.port}"))
        engine = await stack.enter_async_context(asking(f"{scheme}://{proxy.address}"))
        for _ in range(10):
            await ask(engine, request())
            proxy.reset()


@both
async def test_a_silent_server_is_found_out_though_nobody_has_a_deadline(scheme: str) -> None:
    script = Script(scheme)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(script.serving())
        proxy = await stack.enter_async_context(FaultProxy(f"127.0.0.1:{script.port}"))
        url = f"{scheme}://{proxy.address}"
        engine = await stack.enter_async_context(asking(url, connect_timeout_ms="200"))
        await ask(engine, request())
        proxy.down.paused = True
        begun = time.monotonic()
        told = await asyncio.gather(*(ask(engine, request()) for _ in range(4)), return_exceptions=True)
        assert time.monotonic() - begun < 3.0
        assert {type(each) for each in told} == {errors.Unavailable}
        proxy.down.paused = False
        async with asyncio.timeout(5):
            while True:
                try:
                    await ask(engine, request())
                    break
                except errors.Unavailable as error:
                    await asyncio.sleep(error.retry_after or 0)


@both
async def test_a_slow_server_that_is_there_is_waited_for(scheme: str) -> None:
    async with scripted(scheme, connect_timeout_ms="200") as (script, engine):
        await ask(engine)
        script.release.clear()
        async with asyncio.TaskGroup() as tasks:
            slow = tasks.create_task(ask(engine, request()))
            async with asyncio.timeout(10):
                await script.asked.wait()
            script.release.set()
        assert slow.result().outputs


@both
async def test_the_deadline_ends_the_wait(scheme: str) -> None:
    async with scripted(scheme) as (script, engine):
        script.release.clear()
        begun = time.monotonic()
        error = await refused(ask(engine, request(deadline=begun + 0.2)))
        script.release.set()
        assert isinstance(error, errors.DeadlineExceeded)
        assert time.monotonic() - begun < 1.0


# --- at load


@both
async def test_a_decoupled_model_is_refused(scheme: str) -> None:
    script = Script(scheme, config=CONFIG.format(backend="fake") + "model_transaction_policy { decoupled: true }")
    async with script.serving():
        with pytest.raises(errors.Unsupported, match="is decoupled, and a remote engine gives one answer"):
            async with asking(script.url):
                pass


@both
@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        (("max_batch_size: 8", "max_batch_size: 4"), "make it no larger"),
        (("TYPE_FP32", "TYPE_INT8"), "the model has data type INT8"),
        (('"IN"', '"OTHER"'), "unexpected inference input 'IN'"),
        (("dims: 2", "dims: 3"), "expects shape"),
    ],
)
async def test_a_configuration_that_does_not_fit_theirs_is_refused(
    scheme: str, theirs: tuple[str, str], text: str
) -> None:
    script = Script(scheme, config=CONFIG.format(backend="fake").replace(*theirs))
    async with script.serving():
        with pytest.raises(errors.InvalidArgument, match=text):
            async with asking(script.url):
                pass


@both
async def test_a_server_that_is_away_does_not_keep_a_model_from_loading(scheme: str) -> None:
    script = Script(scheme)
    async with script.serving():
        pass  # the port is free again
    async with asking(script.url) as engine:
        assert "does not say now whether it fits" in engine.warnings[0]
        async with script.serving(), asyncio.timeout(5):
            while True:
                try:
                    await ask(engine, request())
                    break
                except errors.Unavailable as error:
                    await asyncio.sleep(error.retry_after or 0)


@both
async def test_what_the_configuration_leaves_out_is_asked_for(scheme: str, tmp_path: Path) -> None:
    script = Script(scheme)
    (tmp_path / "m" / "1").mkdir(parents=True)
    repository = Repository([tmp_path], engines.describe)
    repository.allow_remote(engines.remote_configuration)
    async with script.serving():
        parameter = f'parameters {{ key: "remote.url" value {{ string_value: "{script.url}" }} }}'
        (tmp_path / "m" / "config.pbtxt").write_text(f'backend: "remote" {parameter}')
        source = await asyncio.to_thread(repository.read, "m")
    given = [(tensor.name, tensor.dims) for tensor in (*source.config.inputs, *source.config.outputs)]
    assert given == [("IN", (2,)), ("OUT", (2,))]
    assert source.config.max_batch_size == 8
    assert source.config.batching is not None
    with pytest.raises(errors.Unavailable, match="List input and output in"):
        await asyncio.to_thread(repository.read, "m")


def test_answers_of_another_server_are_not_cached(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    url = 'response_cache { enable: true } parameters { key: "remote.url" value { string_value: "http://far" } }'
    for backend in ("remote", "fake"):
        (tmp_path / "m" / "config.pbtxt").write_text(CONFIG.format(backend=backend) + url)
        repository = Repository([tmp_path], engines.describe, caches=True)
        repository.allow_remote(engines.remote_configuration)
        source = repository.read("m")
        assert source.digests == {}
        assert "response_cache has no effect on a model of another server" in source.warnings[0]


@pytest.mark.parametrize("given", ['"backend": "remote"', '"parameters": {"remote.url": {"string_value": "http://x"}}'])
def test_no_server_is_named_by_a_load_request(tmp_path: Path, given: str) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    repository = Repository([tmp_path], engines.describe)
    repository.allow_remote(engines.remote_configuration)
    with pytest.raises(errors.InvalidArgument, match="not by an override"):
        repository.read("m", {"config": f"{{{given}}}"})


# --- gateways


@both
async def test_tls_and_tokens(scheme: str, tmp_path: Path) -> None:
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost -keyout {tmp_path}/key.pem -out {tmp_path}/cert.pem"
    )
    await asyncio.to_thread(subprocess.run, command.split(), check=True, capture_output=True)
    (tmp_path / "tokens").write_text("edge:s3cret-s3cret-s3cret-s3cret\n")
    (tmp_path / "tokens").chmod(0o600)
    (tmp_path / "token").write_text("s3cret-s3cret-s3cret-s3cret\n")
    (tmp_path / "wrong").write_text("s3cret-s3cret-s3cret-wrong!\n")
    (tmp_path / "models" / "m" / "1").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.pbtxt").write_text(CONFIG.format(backend="fake"))
    settings = Settings(
        model_repository=(tmp_path / "models",), http_port=0, grpc_port=0, allow_metrics=False,
        token_file=tmp_path / "tokens", http_tls_cert=tmp_path / "cert.pem", http_tls_key=tmp_path / "key.pem",
        grpc_use_ssl=True, grpc_server_cert=tmp_path / "cert.pem", grpc_server_key=tmp_path / "key.pem",
    )  # fmt: skip
    async with running(settings) as gateway:
        await gateway.loaded.wait()
        url = f"{scheme}s://localhost:{gateway.ports[scheme]}"
        trusted = {"ca_file": str(tmp_path / "cert.pem"), "connect_timeout_ms": "10000"}
        async with asking(url, token_file=str(tmp_path / "token"), **trusted) as engine:
            assert engine.warnings == ()
            await ask(engine, request())
        async with asking(url, token_file=str(tmp_path / "wrong"), **trusted) as engine:
            assert "check remote.token_file" in engine.warnings[0]
            error = await refused(ask(engine, request()))
            assert isinstance(error, errors.Unavailable)
            assert "token" not in error.message
        async with asking(url, token_file=str(tmp_path / "token")) as engine:
            assert isinstance(await refused(ask(engine, request())), errors.Unavailable)


async def test_a_server_that_asks_for_certificates_gets_ours(tmp_path: Path) -> None:
    def certificate(name: str) -> str:
        return (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
            f"-addext subjectAltName=DNS:localhost -keyout {tmp_path}/{name}.key -out {tmp_path}/{name}.pem"
        )

    for name in ("server", "edge"):
        await asyncio.to_thread(subprocess.run, certificate(name).split(), check=True, capture_output=True)
    (tmp_path / "models" / "m" / "1").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.pbtxt").write_text(CONFIG.format(backend="fake"))
    settings = Settings(
        model_repository=(tmp_path / "models",), allow_http=False, grpc_port=0, allow_metrics=False, grpc_use_ssl=True,
        grpc_server_cert=tmp_path / "server.pem", grpc_server_key=tmp_path / "server.key",
        grpc_use_ssl_mutual=True, grpc_root_cert=tmp_path / "edge.pem",
    )  # fmt: skip
    trusted = {"ca_file": str(tmp_path / "server.pem"), "connect_timeout_ms": "10000"}
    ours = {"cert_file": str(tmp_path / "edge.pem"), "key_file": str(tmp_path / "edge.key")}
    async with running(settings) as gateway:
        await gateway.loaded.wait()
        url = f"grpcs://localhost:{gateway.ports['grpc']}"
        async with asking(url, **trusted, **ours) as engine:
            await ask(engine, request())
        async with asking(url, **{**trusted, "connect_timeout_ms": "500"}) as engine:
            assert isinstance(await refused(ask(engine, request())), errors.Unavailable)


@both
async def test_a_model_of_another_gateway_is_served_as_ones_own(scheme: str, tmp_path: Path) -> None:
    async def infer(gateway: Gateway, asked: InferRequest) -> InferResponse:
        async with aclosing(gateway.service.infer(asked)) as answers:
            return await anext(aiter(answers))

    def write(repository: str, name: str, text: str) -> Path:
        (tmp_path / repository / name / "1").mkdir(parents=True)
        (tmp_path / repository / name / "config.pbtxt").write_text(text)
        return tmp_path / repository

    ports = {"http_port": 0, "grpc_port": 0, "allow_metrics": False, "persist_latency": False}
    far = Settings(model_repository=(write("far", "m", CONFIG.format(backend="fake")),), **ports)
    async with running(far) as there:
        await there.loaded.wait()
        url = f"{scheme}://127.0.0.1:{there.ports[scheme]}"
        parameters = {"remote.url": url, "remote.model": "m"}
        lines = [
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()
        ]
        near = Settings(model_repository=(write("near", "mine", "\n".join(['backend: "remote"', *lines])),), **ports)
        async with running(near) as here, asyncio.timeout(15):
            await here.loaded.wait()
            asked = [request(float(number), model_name="mine", rows=1 + number % 3) for number in range(200)]
            answers = await asyncio.gather(*(infer(here, each) for each in asked))
    for one, answer in zip(asked, answers, strict=True):
        assert answer.outputs["OUT"].array.tolist() == one.inputs["IN"].array.tolist()


@both
async def test_engines_that_never_ran_close(scheme: str) -> None:
    for engine in await engines.create(EngineSpec(config(f"{scheme}://127.0.0.1:1"), "1", Path(), "remote"), 3):
        await engine.close()


# --- with another engine behind it


@both
async def test_it_leaves_the_next_engine_the_time_to_answer(scheme: str) -> None:
    script = Script(scheme)
    async with script.serving():
        followed = replace(config(script.url), parameters={"remote.url": script.url, "fallback": "remote,cpu"})
        (engine,) = await remote.create(EngineSpec(followed, "1", Path(), "remote"), 1)
        try:
            await ask(engine)
            script.release.clear()
            for _ in range(4):  # it is there, so it is only slow
                begun = time.monotonic()
                both_deadlines = request(deadline=begun + 2.0), request(deadline=begun + 60.0)
                assert isinstance(await refused(ask(engine, *both_deadlines)), errors.DeadlineExceeded)
                assert time.monotonic() - begun < 1.5
        finally:
            script.release.set()
            await engine.close()
