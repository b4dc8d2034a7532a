"""What is run of a version that has builds, and who is told: a whole gateway with real ONNX files.

Each file adds another number, so that an answer says which of them gave it.
"""

import asyncio
import tempfile
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import tritonclient.grpc.aio
from prometheus_client.parser import text_string_to_metric_families

from gateway import artefacts, cli, errors
from gateway.app import running
from gateway.config.settings import Settings
from gateway.queues.base import InstanceState, Load
from gateway.queues.redis.announce import pack_holding, read_holding
from gateway.types import DataType, InferRequest, Tensor
from tests.artefacts_support import adder, built, made, write_adder
from tests.support import refusal, until

pytestmark = pytest.mark.slow

HERE = artefacts.device_kind("cpu")
CPU = "CPUExecutionProvider"
CACHED = "response_cache { enable: true }"


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="gw") as path:
        yield Path(path)


@asynccontextmanager
async def serving(folder, **more):
    settings = Settings(
        model_repository=(folder,), http_port=0, grpc_port=0, metrics_port=0, repository_poll_secs=1,
        **{"model_control_mode": "explicit", "load_model": ("*",), "cpu_cores": 1, **more},
    )  # fmt: skip
    async with running(settings) as gateway:
        await gateway.loaded.wait()
        yield gateway


def request(value=1.0, **more):
    array = np.full((1, 2), value, np.float32)
    return InferRequest("adder", {"IN": Tensor.from_array(DataType.FP32, array)}, **more)


async def added(gateway, value=1.0):
    """What the version adds: which file it is run from."""
    async with aclosing(gateway.service.infer(request(value))) as responses:
        (response,) = [response async for response in responses]
    return float(response.outputs["OUT"].array[0, 0]) - value


def state(gateway):
    (version,) = gateway.queue.pool("adder").versions
    return version


async def test_the_best_that_passed_here_is_run_and_told_everywhere(folder):
    version = write_adder(folder)
    files = {"int8": adder(8.0), "bf16": adder(16.0)}
    artefacts.promote(
        version,
        built(version, made("bf16", "BF16", device=HERE, speedup=1.1), made("int8", device=HERE), files=files),
    )
    told = {"device": "cpu", "provider": CPU, "precision": "INT8", "artefact": "int8", "link": "cpu-int8"}
    async with serving(folder) as gateway, httpx.AsyncClient() as client:
        assert await added(gateway) == 8.0
        assert state(gateway).instances == (InstanceState(**told),)
        assert f"1 x cpu {CPU} int8" in cli.table(gateway.queue.pools())
        http = f"http://127.0.0.1:{gateway.ports['http']}/v2/models/adder"
        instances = [{**told, "count": 1}]
        assert (await client.get(http)).json()["parameters"] == {"instances": instances}
        assert (await client.get(f"{http}/explain")).json()["instances"] == instances
        parameter = (await client.get(f"{http}/config")).json()["parameters"]["gateway_instances"]
        config = await triton_config(gateway)
        assert config.parameters["gateway_instances"].string_value == parameter["string_value"]
        assert '"artefact":"int8"' in parameter["string_value"]
        metrics = (await client.get(f"http://127.0.0.1:{gateway.ports['metrics']}/metrics")).text
    (family,) = [each for each in text_string_to_metric_families(metrics) if each.name == "gateway_instances"]
    (sample,) = family.samples
    assert (sample.labels, sample.value) == ({"model": "adder", "version": "1", **told}, 1.0)


async def triton_config(gateway):
    async with tritonclient.grpc.aio.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
        return (await client.get_model_config("adder")).config


async def test_a_client_that_asks_is_told_what_answered_it(folder):
    version = write_adder(folder)
    artefacts.promote(version, built(version, made(device=HERE), files={"int8": adder(8.0)}))
    told = {"engine": CPU, "precision": "INT8", "artefact": "int8"}
    tensor = {"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    async with serving(folder) as gateway, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{gateway.ports['http']}/v2/models/adder/infer"

        async def asked(**parameters):
            answer = (await client.post(url, json={"inputs": [tensor], "parameters": parameters})).json()
            assert answer["outputs"][0]["data"] == [9.0, 10.0]
            return answer.get("parameters")

        assert await asked(engine=True) == told
        assert [await asked(), await asked(engine=False), await asked(engine="yes")] == [None] * 3
        both = await asyncio.gather(asked(engine=True), asked())  # in one batch, maybe; to each its own
        assert both == [told, None]
        target = f"127.0.0.1:{gateway.ports['grpc']}"
        async with tritonclient.grpc.aio.InferenceServerClient(target) as grpc:
            value = tritonclient.grpc.aio.InferInput("IN", [1, 2], "FP32")
            value.set_data_from_numpy(np.ones((1, 2), np.float32))
            result = await grpc.infer("adder", [value], parameters={"engine": True})
        parameters = result.get_response().parameters
        assert {key: parameters[key].string_param for key in parameters} == told


async def test_a_version_without_a_build_is_run_from_its_own_file(folder):
    write_adder(folder)
    async with serving(folder) as gateway:
        assert await added(gateway) == 0.0
        assert state(gateway).instances == (InstanceState("cpu", CPU, "FP32", "fp32"),)
        assert f"1 x cpu {CPU}\n" in cli.table(gateway.queue.pools()) + "\n"


async def test_what_did_not_pass_here_is_not_run(folder, caplog):
    version = write_adder(folder)
    failed = made("s8s8", device=HERE, verdict="failed", reasons=("top1_agreement is 0.645, at least 0.94 is wanted",))
    number = built(version, failed, made("elsewhere", device="cpu:x86-64:other"), made("changed", device=HERE))
    artefacts.promote(version, number)
    (artefacts.build_folder(version, number) / "changed.onnx").write_bytes(adder(1.0))
    with caplog.at_level("INFO", "gateway"):
        async with serving(folder, cpu_cores=2) as gateway:  # two instances, and each reason once
            assert await added(gateway) == 0.0
    said = [str(record.msg) for record in caplog.records if "artefact" in str(record.msg)]
    assert [line.split()[0] for line in said] == ["artefact_not_chosen", "artefact_not_chosen", "artefact_refused"]
    assert "0.645" in said[0]
    assert "cpu:x86-64:other" in said[1]
    assert "changed after the gate saw it" in said[2]


@pytest.mark.parametrize(("precision", "adds"), [("FP32", 0.0), ("INT8", 8.0), ("int8", 8.0)])
async def test_a_precision_is_pinned(folder, precision, adds):
    config = f'parameters {{ key: "precision" value {{ string_value: "{precision}" }} }}'
    version = write_adder(folder, config=config)
    artefacts.promote(version, built(version, made(device=HERE), files={"int8": adder(8.0)}))
    async with serving(folder) as gateway:
        assert await added(gateway) == adds


async def test_a_pin_that_cannot_be_met_makes_the_version_unavailable_and_says_why(folder):
    version = write_adder(folder, config='parameters { key: "precision" value { string_value: "FP16" } }')
    artefacts.promote(version, built(version, made(device=HERE), files={"int8": adder(8.0)}))
    async with serving(folder) as gateway:
        assert state(gateway).state == "UNAVAILABLE"
        assert state(gateway).reason.startswith("model 'adder' version 1 is pinned to precision FP16, and nothing")
        assert "int8 (INT8): it may be run" in state(gateway).reason


async def test_an_artefact_of_other_inputs_is_no_model_of_this_configuration(folder):
    tensors = 'input { name: "IN" data_type: TYPE_FP32 dims: 3 } output { name: "OUT" data_type: TYPE_FP32 dims: 3 }'
    version = write_adder(folder, config=f'{tensors} max_batch_size: 4 backend: "onnxruntime"')
    artefacts.promote(version, built(version, made(device=HERE), files={"int8": adder(8.0)}))
    async with serving(folder) as gateway:
        assert "the model expects shape [-1,2] and the configuration gives [-1,3]" in state(gateway).reason


async def test_promote_and_rollback_change_what_is_served_on_a_load_command(folder, capsys):
    version = write_adder(folder, config=CACHED)
    for number in (1, 2):
        built(version, made(device=HERE), files={"int8": adder(float(number))})
    async with serving(folder, response_cache_bytes=1 << 20) as gateway:
        digests = []
        for command, adds in (
            (None, 0.0),
            (["promote", "adder"], 2.0),
            (["promote", "adder", "--build", "1"], 1.0),
            (["rollback", "adder"], 2.0),
            (["rollback", "adder", "--version", "1"], 0.0),
        ):
            if command is not None:
                assert await asyncio.to_thread(cli.main, [*command, "--model-repository", str(folder)]) == 0
                await gateway.queue.send(Load("adder"))
            # Equal requests: the cache of what was served before must not answer.
            assert await added(gateway) == adds
            digests.append(state(gateway).digest)
    assert all(digests)
    assert [digests.index(digest) for digest in digests] == [0, 1, 2, 1, 0]
    out = capsys.readouterr().out
    assert "adder version 1: build 2 is served now; a server in poll mode follows by itself" in out
    assert f"artefact int8 (INT8, 0.0 MB, 1.50x the speed of FP32): passed on {HERE}, which is here" in out
    assert "adder version 1: its own file 'model.onnx' is served now" in out


async def test_a_promotion_is_seen_in_poll_mode(folder):
    version = write_adder(folder)
    built(version, made(device=HERE), files={"int8": adder(8.0)})
    async with serving(folder, model_control_mode="poll", load_model=()) as gateway:
        assert await added(gateway) == 0.0
        artefacts.promote(version)
        await until(lambda: state(gateway).instances[0].artefact == "int8")
        assert await added(gateway) == 8.0
        (artefacts.build_folder(version, 1) / "int8.onnx").write_bytes(adder(1.0))  # behind the gate's back
        await until(lambda: state(gateway).instances[0].artefact == "fp32")
        assert await added(gateway) == 0.0


def test_the_commands_refuse_in_words(folder, capsys):
    version = write_adder(folder)
    where = ["--model-repository", str(folder)]
    for command, said in (
        (["promote", "other"], "gateway promote: model 'other' is in no model repository"),
        (["promote", "adder", "--version", "3"], "gateway promote: model 'adder' has no version 3; there are: 1"),
        (["promote", "adder"], "gateway promote: model 'adder' version 1 has no build yet"),
        (["rollback", "adder"], "gateway rollback: model 'adder' version 1 is served from its own model file"),
    ):
        assert cli.main([*command, *where]) == 1
        assert capsys.readouterr().err.startswith(said)
    built(version, made(device=HERE, verdict="failed", reasons=("top1_agreement is 0.645, at least 0.94 is wanted",)))
    assert cli.main(["promote", "adder", *where]) == 1
    assert "top1_agreement is 0.645, at least 0.94 is wanted" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["promote", "adder", "--nonsense", *where])
    assert "gateway promote" in capsys.readouterr().err


def test_models_lists_artefacts_with_their_verdicts(folder, capsys):
    version = write_adder(folder)
    failed = made("s8s8", verdict="failed", reasons=("top1_agreement is 0.645, at least 0.94 is wanted",))
    built(version, made(device=HERE, speedup=1.62), failed, files={"int8": adder(8.0)})
    assert cli.main(["models", "--model-repository", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "version 1: builds 1; none is promoted; the newest has:" in out
    assert "artefact s8s8 (INT8, 0.0 MB, 1.50x the speed of FP32): the gate failed it: top1_agreement is 0.645" in out
    artefacts.promote(version)
    assert cli.main(["models", "--model-repository", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "version 1: builds 1; 1 is promoted:" in out
    assert f"artefact int8 (INT8, 0.0 MB, 1.62x the speed of FP32): passed on {HERE}, which is here" in out
    assert "artefact s8s8 (INT8, 0.0 MB, 1.50x the speed of FP32): the gate failed it: top1_agreement is 0.645" in out
    (artefacts.build_folder(version, 1) / "report.json").write_text("{")
    assert cli.main(["models", "--model-repository", str(folder)]) == 0
    assert "version 1: warning: the report of build 1" in capsys.readouterr().out


async def test_the_fleet_hears_of_artefacts(folder):
    version = write_adder(folder)
    artefacts.promote(version, built(version, made(device=HERE), files={"int8": adder(8.0)}))
    async with serving(folder) as gateway:
        holding = pack_holding(gateway.queue.pools(), [])
    pools, _ = read_holding(holding)
    assert pools["adder"].versions[0].instances == (InstanceState("cpu", CPU, "INT8", "int8", "cpu-int8"),)
    # A process of the release before says nothing of them.
    models, names = msgspec.msgpack.decode(holding)
    del models[0][2][0][-2:]
    pools, _ = read_holding(msgspec.msgpack.encode([models, names]))
    assert pools["adder"].versions[0].instances == (InstanceState("cpu", CPU),)


async def test_an_unknown_model_has_no_instances(folder):
    write_adder(folder)
    async with serving(folder) as gateway:

        async def asked():
            return gateway.service.instances("other")

        assert isinstance(await refusal(asked()), errors.NotFound)
