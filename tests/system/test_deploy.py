"""`deploy/` as far as it runs without a docker engine: Valkey with our settings and users, and compose's command lines."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis

from gateway.redis_client import Keys
from gateway.redis_client.keys import GROUP
from gateway.redis_server import find_server
from tests.deploy_files import DEPLOY, ROOT, compose
from tests.system.process import GatewayProcess, ending

KEYS = Keys("lockgate")
NEVER = ["KEYS *", "FLUSHALL", "FLUSHDB", "EVAL 'return 1' 0", "SCRIPT LOAD x", "FUNCTION LIST", "CONFIG GET *", "ACL LIST",
         "SHUTDOWN", "REPLICAOF NO ONE", "MONITOR", "SAVE", "MODULE LIST", "SWAPDB 0 1", "CLIENT LIST"]  # fmt: skip


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run([DEPLOY / "make-secrets.sh", folder], check=True, capture_output=True, timeout=15)
    return folder


@pytest.fixture(scope="module")
def server(secrets: Path, tmp_path_factory) -> Iterator[Path]:
    """The unix socket of a server with `valkey.conf`, but for its port and paths."""
    home = tmp_path_factory.mktemp("redis")
    socket = home / "s"
    # One more user, to see what the others did.
    users = home / "users.acl"
    users.write_text((secrets / "users.acl").read_text() + "user admin on nopass ~* &* +@all\n")
    command = [find_server(), DEPLOY / "redis/valkey.conf", "--port", "0", "--unixsocket", socket, "--dir", home,
               "--aclfile", users]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "ready to accept connections" in line.lower() and "unix" in line.lower():
                break
        assert process.poll() is None, "".join(said)
        yield socket
    finally:
        process.terminate()
        process.communicate(timeout=10)


@contextmanager
def connected(socket: Path, secrets: Path | None = None, user: str | None = None) -> Iterator[redis.Redis]:
    password = "any"
    if secrets is not None:
        password = (secrets / {"lockgate": "redis_password", "keda": "keda_password"}[user or ""]).read_text()
    client = redis.Redis(
        unix_socket_path=str(socket), username=user, password=password if user else None, protocol=2, retry=None
    )
    try:
        yield client
    finally:
        client.close()


def refused(client: redis.Redis, command: str) -> bool:
    try:
        client.execute_command(*command.split())
    except redis.exceptions.NoPermissionError:
        return True
    except redis.exceptions.ResponseError:
        return False
    return False


def test_everybody_else_may_only_ping(server: Path):
    with connected(server) as nobody:
        assert nobody.ping() is True
        assert all(refused(nobody, command) for command in (*NEVER, f"XLEN {KEYS.events}", "GET x", "INFO", "TIME"))


def test_the_user_of_gateways_and_workers_may_not_harm_the_server_or_others(server: Path, secrets: Path):
    with connected(server, secrets, "lockgate") as user:
        assert [command for command in NEVER if not refused(user, command)] == []
        assert all(
            refused(user, command) for command in ("SET other 1", "GET other", "XADD q * a 1", "DEL {other}:models")
        )


def test_the_scaler_may_ask_for_the_lag_and_nothing_else(server: Path, secrets: Path):
    stream = KEYS.requests("digits", "1", 2)
    with connected(server, secrets, "lockgate") as user:
        user.xgroup_create(stream, GROUP, "0", mkstream=True)
        user.xadd(stream, {"a": "1"})
    with connected(server, secrets, "keda") as keda:
        assert int(keda.info("server")["redis_version"].split(".")[0]) >= 7
        assert keda.xinfo_groups(stream)[0]["lag"] == 1
        assert [command for command in NEVER if not refused(keda, command)] == []
        for command in (f"XADD {stream} * a 1", f"XREAD STREAMS {stream} 0", f"DEL {stream}", f"HGETALL {KEYS.models}"):
            assert refused(keda, command)


def words(node: ast.AST) -> list[str]:
    """The constant words that an argument list or tuple begins with."""
    elements = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
    found = []
    for each in elements:
        if not (isinstance(each, ast.Constant) and isinstance(each.value, str) and each.value.isupper()):
            break
        found.append(each.value)
    return found


def sent(known: dict[str, set[str]]) -> set[str]:
    """The commands in the source of what talks to Redis, such as `xadd` and `xgroup|create`."""
    found = set()
    for path in (ROOT / "gateway").rglob("*.py"):
        text = path.read_text()
        if "redis" not in text and ".call(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call | ast.Tuple | ast.List):
                name, second, *_ = [*(word.lower() for word in words(node)), "", ""]
                if name in known:
                    found.add(f"{name}|{second}" if second in known[name] else name)
    return found


def commands_of(client: redis.Redis) -> dict[str, set[str]]:
    """Every command that the server knows, with its subcommands."""
    client.set_response_callback("COMMAND", lambda reply, **_: reply)
    # The last entry of a command's description has those of its subcommands, named `command|subcommand`.
    return {
        info[0].decode(): {each[0].decode().partition("|")[2] for each in info[-1]}
        for info in client.execute_command("COMMAND")
    }


def test_every_command_in_the_source_is_allowed_and_no_other(server: Path):
    allowed = set((DEPLOY / "redis/users.acl.template").read_text().split("user lockgate ")[1].splitlines()[0].split())
    with connected(server, user="admin") as admin:
        used = sent(commands_of(admin))
    assert {"xadd", "xreadgroup", "xack", "xgroup|create", "multi", "auth"} <= used
    assert {rule for rule in allowed if rule.startswith("+")} == {f"+{name}" for name in used}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(ROOT / "model_repo/add_sub", folder / "add_sub")
    return folder


def run(stack: ExitStack, service: str, server: Path, secrets: Path, models: Path) -> GatewayProcess:
    """What compose runs for a service, with the paths and addresses of this machine."""
    command, *flags = compose()["services"][service]["command"]
    here = {"--queue": f"unix://{server}", "--model-repository": str(models)}
    flags = [
        f"{name}={here.get(name) or value.replace('/run/secrets', str(secrets)).replace('0.0.0.0', '127.0.0.1')}"
        for name, _, value in (flag.partition("=") for flag in flags)
    ]
    return stack.enter_context(ending(GatewayProcess(*flags, command=command)))


def ask(
    process: GatewayProcess, path: str, secrets: Path | None = None, body: dict | None = None, port: str = "http"
) -> str:
    token = None if secrets is None else (secrets / "tokens").read_text().splitlines()[0].partition(":")[2]
    request = urllib.request.Request(
        f"http://127.0.0.1:{process.ports[port]}{path}",
        None if body is None else json.dumps(body).encode(),
        {} if token is None else {"Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


SUM = {
    "inputs": [
        {"name": name, "datatype": "FP32", "shape": [1, 16], "data": [*range(16)]} for name in ("INPUT0", "INPUT1")
    ]
}


@pytest.mark.slow
def test_the_command_lines_of_compose_serve_and_drain(server: Path, secrets: Path, models: Path):
    with ExitStack() as stack:
        worker, *gateways = (run(stack, name, server, secrets, models) for name in ("worker", "gateway-1", "gateway-2"))
        worker.wait_for("model_ready", model="add_sub")
        for process in (worker, *gateways):
            process.wait_listening()
            process.wait_ready()
        for gateway in gateways:
            answer = json.loads(ask(gateway, "/v2/models/add_sub/infer", secrets, SUM))
            assert answer["outputs"][0]["data"] == [2 * number for number in range(16)]
        for process in (worker, *gateways):
            # As health checks and probes ask: on the metrics port and without a token.
            assert "true" in ask(process, "/v2/health/live", port="metrics")
            assert "true" in ask(process, "/v2/health/ready", port="metrics")
            assert "nv_inference_request_success" in ask(process, "/metrics", secrets, port="metrics")
        assert [process.terminate() for process in (*gateways, worker)] == [0, 0, 0]
    with connected(server, user="admin") as admin:
        assert [(entry["reason"], entry["object"]) for entry in admin.acl_log() if entry["username"] == "lockgate"
                and "test" not in entry["client-info"]] == []  # fmt: skip
