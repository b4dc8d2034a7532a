"""`deploy/`, without a docker engine or a cluster: its files say what this gateway understands, and agree with each other."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import shlex
import stat
import subprocess
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from gateway import __version__, cli
from gateway.artefacts import Artefact
from gateway.config.arguments import flag, parse_args
from gateway.config.build import build
from gateway.config.complete import fill_backend
from gateway.config.parse import Source, parse_text
from gateway.config.settings import Settings
from gateway.engines.base import EngineSpec
from gateway.engines.chain import links
from gateway.engines.remote.options import read
from gateway.redis_client import Keys
from gateway.redis_client.keys import GROUP
from gateway.statistics import FAILURE_REASONS
from gateway.supervisor.supervisor import _MARGIN, plan
from gateway.transport.auth import Tokens
from gateway.transport.fleet import _TOTALS
from tests import deploy_files as deploy
from tests.deploy_files import DEPLOY, ROOT, Command

COMMANDS = deploy.commands()
RENDERINGS = deploy.renderings()
FLAGS = {flag(name): name for name in Settings.model_fields}
PORTS = {name: Settings.model_fields[f"{name}_port"].default for name in ("http", "grpc", "metrics")}
MARGIN = 5  # seconds to close in, after a drain that took all its time

everywhere = pytest.mark.parametrize("objects", RENDERINGS.values(), ids=RENDERINGS.keys())
each_command = pytest.mark.parametrize("command", COMMANDS, ids=[each.where for each in COMMANDS])
each_dockerfile = pytest.mark.parametrize("path", deploy.DOCKERFILES, ids=lambda path: path.name)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the real command line makes of a command; files and folders it names are there."""

    def path(name: str, value: str) -> str:
        if "Path" not in str(Settings.model_fields[name].annotation):
            return value
        stand_in = tmp_path / value.replace("/", "_")
        stand_in.write_text("")
        return str(stand_in)

    def parse(command: Command) -> Settings:
        for name, value in command.variables.items():
            if name.startswith("GATEWAY_"):
                monkeypatch.setenv(name, path(name.removeprefix("GATEWAY_").lower(), value))
        words = list(command.words[1:])
        if command.words[0] == "worker":
            words.append("--role=worker")
        for place, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name not in FLAGS:
                continue
            if equals:
                words[place] = f"{name}={path(FLAGS[name], value)}"
            elif place + 1 < len(words) and not words[place + 1].startswith("--"):
                words[place + 1] = path(FLAGS[name], words[place + 1])
        return parse_args(words)

    return parse


# --- command lines


def test_every_place_that_starts_a_gateway_is_found():
    places = {each.where for each in COMMANDS}
    assert {"compose.yaml gateway-1", "compose.yaml gateway-2", "compose.yaml worker"} <= places
    assert {"lockgate.service", "lockgate-edge.service"} <= places
    assert {"Dockerfile.cpu", "Dockerfile.gpu"} <= places
    assert {f"kubernetes (written) {role}" for role in ("gateway", "worker")} <= places
    assert {each.words[0] for each in COMMANDS} <= {"serve", "worker"}


@each_command
def test_every_flag_and_variable_is_one_of_the_command_line(command: Command):
    assert f"\n  {command.words[0]} " in cli.USAGE
    assert [each for each in command.flags() if each not in FLAGS] == []
    variables = [name for name in command.variables if name.startswith("GATEWAY_")]
    assert [name for name in variables if name.removeprefix("GATEWAY_").lower() not in Settings.model_fields] == []


@each_command
def test_every_command_line_makes_safe_settings(command: Command, settings):
    made = settings(command)
    assert made.token_file is not None
    assert not made.insecure


@each_command
def test_no_command_line_has_a_secret_in_it(command: Command):
    text = " ".join([*command.words, *command.variables.values()])
    assert not re.search(r"://[^/\s]*@", text)
    assert not re.search(r"password=|token=|secret=", text)


def test_gateways_and_workers_use_one_queue(settings):
    for places in ("compose.yaml", "kubernetes (written)"):
        made = [settings(each) for each in COMMANDS if each.where.startswith(places)]
        assert len({each.queue for each in made}) == 1
        assert len({each.queue_prefix for each in made}) == 1
        assert all(each.queue_username and each.queue_password_file and each.queue_key_file for each in made)


# --- what serves


def test_compose_has_redis_two_gateways_and_two_workers():
    services = deploy.compose()["services"]
    assert [name for name in services if name.startswith("gateway")] == ["gateway-1", "gateway-2"]
    assert services["worker"]["deploy"]["replicas"] == 2
    assert services["redis"]["command"] == ["valkey-server", "/etc/valkey/valkey.conf"]


def test_compose_publishes_ports_that_gateways_listen_on_to_this_machine_alone(settings):
    published = []
    for command in COMMANDS:
        if command.where.startswith("compose.yaml gateway"):
            made = settings(command)
            service = deploy.compose()["services"][command.where.split()[1]]
            ports = [each.split(":") for each in service["ports"]]
            assert {address for address, _, _ in ports} == {"127.0.0.1"}
            assert [int(inside) for _, _, inside in ports] == [made.http_port, made.grpc_port, made.metrics_port]
            published += [outside for _, outside, _ in ports]
    assert len(set(published)) == len(published) == 6


@everywhere
def test_container_ports_are_those_that_are_listened_on(objects):
    for name, container in deploy.containers(objects).items():
        if name == "redis":
            assert container["ports"] == [{"name": "redis", "containerPort": 6379}]
            continue
        named = {each["name"]: each["containerPort"] for each in container["ports"]}
        assert named == (PORTS if name == "gateway" else {"metrics": PORTS["metrics"]})


@everywhere
def test_services_and_policies_name_ports_and_pods_that_there_are(objects):
    pods = {name: pod["metadata"]["labels"] for name, pod in deploy.templates(objects).items()}
    ports = {name: {each["name"] for each in deploy.containers(objects)[name]["ports"]} for name in pods}

    def selected(labels: dict[str, str]) -> list[str]:
        return [name for name, has in pods.items() if labels.items() <= has.items()]

    for each in objects:
        spec, kind = each.get("spec", {}), each["kind"]
        if kind == "Service":
            (pod,) = selected(spec["selector"])
            assert {port["targetPort"] for port in spec["ports"]} <= ports[pod]
        elif kind == "PodDisruptionBudget":
            assert selected(spec["selector"]["matchLabels"]) == [each["metadata"]["name"]]
        elif kind == "NetworkPolicy" and spec["podSelector"]:
            (pod,) = selected(spec["podSelector"]["matchLabels"])
            incoming = {port["port"] for rule in spec["ingress"] for port in rule["ports"]}
            assert incoming == ports[pod]


@everywhere
def test_nothing_may_talk_but_what_a_policy_names(objects):
    policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    assert any(each["podSelector"] == {} and set(each["policyTypes"]) == {"Ingress", "Egress"} for each in policies)
    assert all("from" in rule for each in policies for rule in each.get("ingress", []))
    assert all("to" in rule for each in policies for rule in each.get("egress", []))


@everywhere
def test_gateways_and_workers_have_budgets_and_autoscalers(objects):
    def named(kind: str) -> set[str]:
        return {each["metadata"]["name"] for each in objects if each["kind"] == kind}

    assert named("PodDisruptionBudget") == named("Deployment") == {"gateway", "worker"}
    scaled = [each["spec"] for each in objects if each["kind"] == "ScaledObject"]
    assert {each["scaleTargetRef"]["name"] for each in scaled} == named("Deployment")
    # With one pod, a budget of one would stop everything.
    assert all(each["minReplicaCount"] >= 2 for each in scaled)
    assert not any("replicas" in each["spec"] for each in objects if each["kind"] == "Deployment")


# --- probes and metrics


def endpoints(port: str) -> set[str]:
    """The paths of health that a port answers by itself, and without a token."""
    source = (
        ROOT / {"http": "gateway/transport/http/app.py", "metrics": "gateway/transport/metrics.py"}[port]
    ).read_text()
    return set(re.findall(r'"(/v2/health/\w+)"', source))


@everywhere
def test_probes_ask_for_paths_that_are_answered(objects):
    for name in ("gateway", "worker"):
        container = deploy.containers(objects)[name]
        asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
        assert all(each["path"] in endpoints(each["port"]) for each in asked.values())
        assert asked["liveness"]["path"] == "/v2/health/live"
        assert asked["readiness"]["path"] == "/v2/health/ready"
        assert {each["port"] for each in asked.values()} == {"http" if name == "gateway" else "metrics"}


def health_checks() -> dict[str, list[str]]:
    found = {"compose.yaml": deploy.compose()["x-process"]["healthcheck"]["test"][1:]}
    for path in deploy.DOCKERFILES:
        (check,) = [rest for word, rest in deploy.stages(path)[-1] if word == "HEALTHCHECK"]
        found[path.name] = json.loads(check[check.index("CMD") + 3 :])
    return found


@pytest.mark.parametrize("words", health_checks().values(), ids=health_checks().keys())
def test_health_checks_ask_the_metrics_port_for_a_path_that_is_answered(words):
    python, option, program = words
    assert (python, option) == ("python", "-c")
    compile(program, "healthcheck", "exec")
    assert f"'127.0.0.1', {PORTS['metrics']}" in program
    assert set(re.findall(r"/v2/\w+/\w+", program)) <= endpoints("metrics")


def exported() -> set[str]:
    """The names of every metric family, from the source that makes them."""
    names = {f"gateway_{name}_total" for name in _TOTALS}
    for path in (ROOT / "gateway/transport").glob("*.py"):
        constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        names |= {each for each in constants if isinstance(each, str) and re.fullmatch(r"(nv|gateway)_\w+", each)}
    assert {"nv_inference_request_success", "gateway_request_seconds"} <= names
    return names


def rules() -> list[dict[str, Any]]:
    (alerts,) = deploy.documents(DEPLOY / "prometheus/alerts.yaml")
    return [rule for group in alerts["groups"] for rule in group["rules"]]


def queries() -> list[str]:
    asked = [rule["expr"] for rule in rules()]
    for objects in RENDERINGS.values():
        asked += [
            trigger["metadata"]["query"]
            for each in objects
            if each["kind"] == "ScaledObject"
            for trigger in each["spec"]["triggers"]
            if trigger["type"] == "prometheus"
        ]
    return asked


def test_alerts_and_scalers_ask_for_metrics_that_are_exported():
    asked = {name for query in queries() for name in re.findall(r"\b((?:nv|gateway)_\w+)", query)}
    assert "gateway_desired_replicas" in asked
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) if name not in exported() else name for name in asked}
    assert plain <= exported()


@pytest.mark.parametrize("query", queries())
def test_targets_are_never_added_up(query: str):
    """Each of them tells of the whole fleet."""
    assert all("instance" in kept for kept in re.findall(r"sum by \((.*?)\)", query))
    assert all(rest.startswith("max by (model, version) ") for rest in re.findall(r"sum\((.*)", query))
    assert re.search(r"\b(max|absent)\b|^up\{", query)


def test_alerts_tell_reasons_that_there_are():
    readme = (ROOT / "README.md").read_text()
    refusals = set(re.findall(r"^\| `(\w+)` +\|", readme, re.MULTILINE))
    for rule in rules():
        for name, reasons in re.findall(r'(\w+)\{reason=~?"([\w|]+)"\}', rule["expr"]):
            known = set(FAILURE_REASONS) if name == "nv_inference_request_failure" else refusals
            assert set(reasons.split("|")) <= known


def test_prometheus_shows_a_token_to_the_targets_that_there_are():
    for name in ("compose", "kubernetes"):
        (config,) = deploy.documents(DEPLOY / f"prometheus/{name}.yaml")
        assert config["rule_files"] == ["alerts.yaml"]
        (job,) = config["scrape_configs"]
        assert job["job_name"] == "lockgate"
        assert job["authorization"]["credentials_file"]
        for target in [each for group in job.get("static_configs", []) for each in group["targets"]]:
            published = [each for service in deploy.compose()["services"].values() for each in service.get("ports", [])]
            assert any(each == f"{target}:{PORTS['metrics']}" for each in published)


def test_the_alert_for_more_workers_knows_how_many_there_may_be():
    (limit,) = {
        each["spec"]["maxReplicaCount"]
        for each in deploy.written()["written"]
        if each["kind"] == "ScaledObject" and each["metadata"]["name"] == "worker"
    }
    (expression,) = [rule["expr"] for rule in rules() if rule["alert"] == "LockgateWantsMoreWorkers"]
    assert expression.endswith(f"> {limit}")


# --- stopping


@everywhere
def test_pods_have_the_time_that_their_drain_may_take(objects, settings):
    for name, pod in deploy.templates(objects).items():
        if name == "redis":
            continue
        (container,) = pod["spec"]["containers"]
        drain = settings(Command(name, tuple(container["args"]))).exit_timeout_secs
        before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["spec"]["terminationGracePeriodSeconds"] >= before + drain + MARGIN
        # Traffic is sent to gateways, so they serve on until every node knows that they leave.
        assert (before >= 5) == (name == "gateway")


def test_containers_and_the_unit_have_the_time_that_their_drain_may_take(settings):
    services = deploy.compose()["services"]
    for command in COMMANDS:
        drain = settings(command).exit_timeout_secs
        if command.where.startswith("compose.yaml"):
            service = services[command.where.split()[1]]
            assert service["stop_signal"] == "SIGTERM"
            assert int(service["stop_grace_period"].removesuffix("s")) >= drain + MARGIN
        elif command.where == "lockgate.service":
            assert plan(settings(command)) is not None
            # The supervisor ends the gateways and then the workers, and leaves each of them time to close.
            assert int(deploy.unit()["TimeoutStopSec"][0]) >= 2 * (drain + _MARGIN) + MARGIN
        elif command.where == "lockgate-edge.service":
            assert not {"GATEWAY_WORKERS", "GATEWAY_HTTP_WORKERS", "GATEWAY_QUEUE"} & command.variables.keys()
            assert int(deploy.unit(command.where)["TimeoutStopSec"][0]) >= drain + MARGIN


@pytest.mark.parametrize("name", deploy.UNITS)
def test_a_unit_tells_the_gateway_alone_to_end(name: str):
    unit = deploy.unit(name)
    assert unit["KillMode"] == ["mixed"]
    assert unit["KillSignal"] == ["SIGTERM"]


# --- the edge


def edge_parameters() -> dict[str, str]:
    source = Source("config.pbtxt", (DEPLOY / "edge/config.pbtxt").read_text())
    return {key: value.string_value for key, value in parse_text(source).parameters.items()}


def test_the_edge_model_asks_the_far_server_first_and_has_engines_of_its_own(tmp_path: Path):
    parameters = edge_parameters()
    source = Source("config.pbtxt", (DEPLOY / "edge/config.pbtxt").read_text())
    proto = fill_backend(parse_text(source), "classifier", ["model.onnx"])
    for kind in (proto.input, proto.output):
        kind.add(name=f"T{len(proto.input)}", data_type="TYPE_FP32", dims=[1])
    config = build(proto, source)
    assert config.default_deadline_ms == 500
    artefact = Artefact("int8", "artefacts/1/int8.onnx", "onnxruntime", "INT8", verdict="passed")
    given = Artefact("model", "model.onnx", "onnxruntime", "FP32", verdict="passed")
    spec = EngineSpec(config, "1", tmp_path, "cpu")
    chain = links(spec, (), (artefact, given), ("onnxruntime", "remote"))
    assert [link.name for link in chain.links] == ["remote", "cpu-int8", "cpu"]
    assert parameters["remote.url"].startswith("grpcs://")


def test_the_edge_unit_hands_over_the_token_that_the_edge_model_names(tmp_path: Path):
    parameters = edge_parameters()
    folder, name = parameters["remote.token_file"].rsplit("/", 1)
    assert folder == "/run/credentials/lockgate-edge.service"
    credentials = dict(each.split(":", 1) for each in deploy.unit("lockgate-edge.service")["LoadCredential"])
    assert {name, "tokens"} == credentials.keys()
    (tmp_path / name).write_text("t0ken")
    options = read("classifier", parameters | {"remote.token_file": str(tmp_path / name)})
    assert (options.model, options.token, options.warnings) == ("efficientnet_lite0", "t0ken", ())


# --- images


def images() -> dict[str, str]:
    found = {f"compose {name}": each["image"] for name, each in deploy.compose()["services"].items()}
    (gpu,) = deploy.documents(DEPLOY / "compose.gpu.yaml")
    found |= {f"compose.gpu {name}": each["image"] for name, each in gpu["services"].items()}
    patches = {path.parent.name: deploy.documents(path) for path in deploy.OVERLAYS[0].parent.glob("*/worker.yaml")}
    for rendering, objects in [*RENDERINGS.items(), *((f"patch {name}", patch) for name, patch in patches.items())]:
        found |= {f"{rendering} {name}": each["image"] for name, each in deploy.containers(objects).items()}
    for path in deploy.DOCKERFILES:
        (argument,) = [rest for word, rest in deploy.instructions(path) if word == "ARG"]
        name, image = argument.split("=", 1)
        for number, stage in enumerate(deploy.stages(path)):
            found[f"{path.name} stage {number}"] = stage[0][1].split()[0].replace(f"${{{name}}}", image)
    return found


@pytest.mark.parametrize("image", images().values(), ids=images().keys())
def test_every_image_is_pinned(image: str):
    ours = {f"lockgate:{__version__}-{path.suffix[1:]}" for path in deploy.DOCKERFILES}
    assert image in ours or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}", image)


def test_gpu_workers_run_the_gpu_image():
    (gpu,) = deploy.documents(DEPLOY / "compose.gpu.yaml")
    assert gpu["services"]["worker"]["image"].endswith("-gpu")
    if "gpu" in RENDERINGS:
        worker = deploy.containers(RENDERINGS["gpu"])["worker"]
        assert worker["image"].endswith("-gpu")
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"


@each_dockerfile
def test_a_dockerfile_builds_in_one_stage_and_runs_in_another_as_nobody_in_particular(path: Path):
    build, final = deploy.stages(path)
    words = [word for word, _ in final]
    assert [rest for word, rest in final if word == "USER"] == ["10001:10001"]
    assert words.index("USER") > max(place for place, word in enumerate(words) if word in ("COPY", "RUN"))
    assert "ADD" not in words
    # The network is used to build, never to run.
    assert not re.search(r"\b(apt-get|pip|curl|wget)\b", " ".join(rest for word, rest in final if word == "RUN"))
    assert all(rest.startswith("--from=build ") for word, rest in final if word == "COPY")
    assert any("venv /opt/lockgate" in rest for word, rest in build if word == "RUN")


@each_dockerfile
def test_a_dockerfile_starts_the_gateway_so_that_signals_reach_it(path: Path):
    final = dict(deploy.stages(path)[-1])
    assert json.loads(final["ENTRYPOINT"]) == ["tini", "--", "gateway"]
    assert final["STOPSIGNAL"] == "SIGTERM"
    assert [int(port) for port in final["EXPOSE"].split()] == list(PORTS.values())


@each_dockerfile
def test_a_dockerfile_copies_and_installs_what_there_is(path: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = {
        found
        for word, rest in deploy.instructions(path)
        if word == "RUN"
        for found in re.findall(r"'\.\[(.*?)\]'", rest)
    }
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for word, rest in deploy.stages(path)[0]:
        if word == "COPY":
            *sources, _ = rest.split()
            assert [each for each in sources if not (ROOT / each).exists()] == []
    pinned = {line.split("==")[0].lower() for line in constraints()}
    wanted = [
        *project["dependencies"],
        *(each for extra in extras.split(",") for each in project["optional-dependencies"][extra]),
    ]
    names = {re.split(r"[\[<>=;! ]", each)[0].lower() for each in wanted}
    assert names <= pinned


def constraints() -> list[str]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_constraints_name_one_version_of_each_package():
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+", line) for line in constraints())
    names = [line.split("==")[0].lower().replace("_", "-") for line in constraints()]
    assert len(set(names)) == len(names)


# --- privileges


@everywhere
def test_pods_keep_to_the_restricted_security_standard(objects):
    for pod in deploy.templates(objects).values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert {kind for each in spec["volumes"] for kind in each if kind != "name"} <= {
            "secret", "configMap", "emptyDir", "persistentVolumeClaim",
        }  # fmt: skip
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_compose_services_have_no_privileges():
    for service in deploy.compose()["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["user"].split(":")[0]) > 0
        assert "mem_limit" in service
        assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & set(service)
    assert deploy.compose()["networks"]["queue"] == {"internal": True}
    assert [name for name, each in deploy.compose()["services"].items() if "front" in each["networks"]] == [
        "gateway-1", "gateway-2",
    ]  # fmt: skip


def test_gateways_and_workers_of_compose_share_one_shm():
    services = deploy.compose()["services"]
    assert all("shm:/dev/shm" in services[name]["volumes"] for name in ("gateway-1", "gateway-2", "worker"))
    assert deploy.compose()["volumes"]["shm"]["driver_opts"]["type"] == "tmpfs"
    assert len({services[name]["user"] for name in ("gateway-1", "worker")}) == 1


def memory(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]+)", text).groups()
    return int(number) << {"g": 30, "gb": 30, "gi": 30, "mi": 20, "m": 20}[unit.lower()]


@everywhere
def test_memory_limits_leave_room_for_what_may_be_held(objects, settings):
    gateway = deploy.containers(objects)["gateway"]
    held = settings(Command("gateway", tuple(gateway["args"]))).max_inflight_bytes
    assert memory(gateway["resources"]["limits"]["memory"]) >= 2 * held
    redis = deploy.containers(objects)["redis"]
    assert memory(redis["resources"]["limits"]["memory"]) >= 2 * memory(valkey()["maxmemory"])


# --- secrets


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    """What `make-secrets.sh` makes."""
    folder = tmp_path_factory.mktemp("deploy") / "secrets"
    subprocess.run([DEPLOY / "make-secrets.sh", folder], check=True, capture_output=True, timeout=15)
    return folder


def test_secrets_are_made_once_for_their_owner_alone(secrets: Path):
    before = {each.name: each.read_bytes() for each in secrets.iterdir()}
    subprocess.run([DEPLOY / "make-secrets.sh", secrets], check=True, capture_output=True, timeout=15)
    assert {each.name: each.read_bytes() for each in secrets.iterdir()} == before
    assert {stat.S_IMODE(each.stat().st_mode) for each in secrets.iterdir()} == {0o600}
    tokens = Tokens.load(secrets / "tokens")
    assert tokens.tenant(f"Bearer {(secrets / 'scrape_token').read_text()}") == "monitoring"
    digest = sha256((secrets / "redis_password").read_bytes()).hexdigest()
    assert f"user lockgate on #{digest} " in (secrets / "users.acl").read_text()
    assert len((secrets / "redis_password").read_text()) == 64
    assert (secrets / "redis_password").read_text() not in (secrets / "users.acl").read_text()


def test_compose_refers_to_secrets_that_are_made(secrets: Path):
    declared = deploy.compose()["secrets"]
    assert {Path(each["file"]).name for each in declared.values()} <= {each.name for each in secrets.iterdir()}
    assert all(each["file"].startswith("./secrets/") for each in declared.values())
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    for command in COMMANDS:
        if command.where.startswith("compose.yaml"):
            mounted = deploy.compose()["services"][command.where.split()[1]]["secrets"]
            named = re.findall(r"/run/secrets/([\w.]+)", " ".join(command.words))
            assert named
            assert set(named) <= set(mounted) <= set(declared)


def created() -> dict[str, set[str]]:
    """The Secrets that the README says to create, with their keys."""
    found: dict[str, set[str]] = {}
    for line in (DEPLOY / "README.md").read_text().replace("\\\n", " ").splitlines():
        if "create secret generic" in line:
            words = shlex.split(line)
            name = words[words.index("generic") + 1]
            keys = [word.partition("=")[2] for word in words if word.startswith(("--from-file=", "--from-literal="))]
            found[name] = {key.partition("=")[0].rpartition("/")[2] for key in keys}
    return found


@everywhere
def test_pods_refer_to_secrets_that_are_created_and_none_is_written_down(objects):
    assert not any(each["kind"] == "Secret" for each in objects)
    secrets = created()
    for name, pod in deploy.templates(objects).items():
        mounts = {each["name"]: each["mountPath"] for each in pod["spec"]["containers"][0]["volumeMounts"]}
        for volume in pod["spec"]["volumes"]:
            if "secret" in volume:
                words = " ".join(pod["spec"]["containers"][0]["args"])
                keys = set(re.findall(re.escape(mounts[volume["name"]]) + r"/([\w.]+)", words))
                assert keys <= secrets[volume["secret"]["secretName"]]
                assert keys or name == "redis"
    for each in objects:
        if each["kind"] == "TriggerAuthentication":
            for reference in each["spec"]["secretTargetRef"]:
                assert reference["key"] in secrets[reference["name"]]


@everywhere
def test_nothing_that_looks_like_a_secret_is_in_an_environment(objects):
    assert not any(each.get("env") for each in deploy.containers(objects).values())
    assert not any("environment" in each for each in deploy.compose()["services"].values())


# --- Redis


def valkey() -> dict[str, str]:
    lines = (DEPLOY / "redis/valkey.conf").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))


def test_redis_keeps_what_it_was_given():
    assert valkey()["maxmemory-policy"] == "noeviction"
    assert valkey()["appendonly"] == "yes"
    assert valkey()["appendfsync"] == "everysec"
    assert int(valkey()["port"]) == 6379


def users() -> dict[str, list[str]]:
    lines = (DEPLOY / "redis/users.acl.template").read_text().splitlines()
    return {line.split()[1]: line.split()[2:] for line in lines}


def test_the_redis_user_of_the_command_lines_reaches_every_key(settings):
    (username,) = {
        settings(each).queue_username for each in COMMANDS if each.where.startswith(("compose", "kubernetes"))
    }
    keys = Keys(Settings.model_fields["queue_prefix"].default)
    made = [value for value in vars(keys).values() if isinstance(value, str) and ":" in value]
    made += [keys.process("p"), keys.requests("m", "1", 2), keys.dead("m", "1"), keys.replies("p"), keys.payload("b")]
    made += [keys.idempotency("d"), keys.cached("d"), keys.job("j"), keys.jobs("queued")]
    patterns = [rule.removeprefix("~") for rule in users()[username] if rule.startswith("~")]
    assert [key for key in made if not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)] == []


@everywhere
def test_scalers_watch_streams_that_the_gateway_writes(objects):
    triggers = [
        trigger["metadata"]
        for each in objects
        if each["kind"] == "ScaledObject"
        for trigger in each["spec"]["triggers"]
        if trigger["type"] == "redis-streams"
    ]
    keys = Keys(Settings.model_fields["queue_prefix"].default)
    lanes: dict[tuple[str, str], set[int]] = {}
    for each in triggers:
        model, version, klass = re.fullmatch(r".*\{(.+)/(\d+)\}:(\d)", each["stream"]).groups()
        assert each["stream"] == keys.requests(model, version, int(klass))
        assert each["consumerGroup"] == GROUP
        assert int(each["lagCount"]) > 0
        lanes.setdefault((model, version), set()).add(int(klass))
        (pattern,) = [rule.removeprefix("%R~") for rule in users()["keda"] if rule.startswith("%R~")]
        assert fnmatch.fnmatchcase(each["stream"], pattern)
    assert lanes
    assert all(classes == {1, 2, 3} for classes in lanes.values())
    assert all((ROOT / "model_repo" / model / version).is_dir() for model, version in lanes)


# --- files


def test_every_file_is_in_the_readme():
    readme = (DEPLOY / "README.md").read_text()
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."]
    done = subprocess.run(listing, cwd=DEPLOY, check=True, capture_output=True, text=True, timeout=15)
    parts = ("kubernetes/base/", "kubernetes/keda/")
    files = [name for name in done.stdout.split() if not name.startswith((*parts, "README.md"))]
    assert len(files) > 15
    named = [name for name in files if f"({name})" in readme or f"`{Path(name).name}`" in readme]
    assert [name for name in files if name not in named and not name.endswith("kustomization.yaml")] == []
    assert all(f"({part})" in readme for part in parts)


def test_kustomizations_name_every_file():
    for path in [*(DEPLOY / "kubernetes").rglob("kustomization.yaml"), DEPLOY / "redis/kustomization.yaml"]:
        (document,) = deploy.documents(path)
        named = [*document.get("resources", []), *document.get("components", [])]
        named += [each["path"] for each in document.get("patches", [])]
        assert [each for each in named if not (path.parent / each).exists()] == []
        beside = {each.name for each in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert beside <= set(named)
