"""The tritonserver command line: every flag of NVIDIA's is mapped or refused by name with a remedy, none ignored."""

import shlex
from pathlib import Path

import pytest

from gateway import cli
from gateway.config import tritonserver
from gateway.config.arguments import parse_args
from gateway.config.settings import Settings
from gateway.errors import InvalidArgument

LIST = (Path(__file__).parents[1] / "data" / "tritonserver_flags.txt").read_text().split()
BASE = ["--model-repository", "/models"]
VALUES = {  # a value of each setting's type
    "model_control_mode": "poll",
    "metrics_address": "localhost",
    "grpc_infer_response_compression_level": "high",
    "http_address": "localhost",
    "grpc_address": "localhost",
    "response_cache_bytes": "local,size=9",
    "default_max_batch_size": "default-max-batch-size=9",
    "http_restricted_api": "health:k=v",
    "grpc_restricted_protocol": "health:k=v",
    "trace_config": "rate=9",
    "rate_limit": "execution_count",
    "rate_limit_resource": "R:1:0",
    "grpc_server_cert": __file__,
    "grpc_server_key": __file__,
    "grpc_root_cert": __file__,
}
TOGETHER = {
    "load-model": ["--model-control-mode=explicit"],
    "grpc-use-ssl": [f"--grpc-server-cert={__file__}", f"--grpc-server-key={__file__}"],
    "grpc-use-ssl-mutual": [
        f"--grpc-server-cert={__file__}", f"--grpc-server-key={__file__}", f"--grpc-root-cert={__file__}",
    ],
    "reuse-http-port": ["--reuse-grpc-port=true"],
    "reuse-grpc-port": ["--reuse-http-port=true"],
}  # fmt: skip
MAPPED = [name for name, flag in tritonserver.FLAGS.items() if flag.setting]
REFUSED = [name for name, flag in tritonserver.FLAGS.items() if not flag.setting]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GATEWAY_{name.upper()}", raising=False)


def settings(*argv: str) -> Settings:
    return parse_args(tritonserver.translate([*BASE, *argv]))


def refusal(*argv: str) -> str:
    with pytest.raises(InvalidArgument) as caught:
        tritonserver.translate([*BASE, *argv])
    return caught.value.message


def test_the_table_has_every_flag_of_tritonserver_and_no_other():
    assert sorted([*tritonserver.FLAGS, "help"]) == LIST


def value_of(name: str) -> str:
    flag = tritonserver.FLAGS[name]
    if flag.kind == "bool":
        return "false" if getattr(settings(), flag.setting) else "true"
    return VALUES.get(flag.setting, "7")


@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
@pytest.mark.parametrize("name", MAPPED)
def test_a_flag_with_a_setting_sets_it(name: str, form: str):
    flag = tritonserver.FLAGS[name]
    words = ["--" + name] if flag.kind == "switch" else form.format(name, value_of(name)).split()
    given = settings(*words, *TOGETHER.get(name, []))
    assert getattr(given, flag.setting) != getattr(settings(), flag.setting)


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_without_a_setting_is_refused_by_name_with_a_remedy(name: str):
    # Once there is a setting of this name, it is to be mapped.
    assert name == "log-format" or name.replace("-", "_") not in Settings.model_fields
    flag = tritonserver.FLAGS[name]
    value = "false" if "true" in flag.takes else "true"
    text = refusal(f"--{name}={value}")
    assert text.startswith(f"--{name} is not supported by this server; ")
    assert flag.remedy.split()[0] in ("remove", "use", "send")


@pytest.mark.parametrize(("name", "value"), [(name, v) for name in REFUSED for v in tritonserver.FLAGS[name].takes])
def test_a_value_that_asks_for_what_is_done_anyway_is_taken(name: str, value: str):
    assert settings(f"--{name}={value}") == settings()


def test_a_real_command_line():
    line = (
        "--model-store=/a --model-control-mode explicit --load-model=x --strict-readiness off --log-verbose=true "
        "--metrics-interval-ms=1500.0 --id edge --allow-grpc=0 --model-config-n h100"
    )
    given = parse_args(tritonserver.translate(shlex.split(line)))
    assert given.model_repository == (Path("/a"),)
    assert (given.load_model, given.strict_readiness, given.allow_grpc) == (("x",), False, False)
    assert (given.log_verbose, given.metrics_interval_ms, given.server_id) == (1, 1500, "edge")
    assert given.model_config_name == "h100"


def test_defaults_are_tritons():
    given = settings()
    assert {given.http_address, given.grpc_address, given.metrics_address} == {"0.0.0.0"}
    assert (given.exit_on_error, given.allow_python_models, given.startup_table) == (True, True, "triton")
    assert (given.server_id, given.http_port, given.grpc_port, given.metrics_port) == ("triton", 8000, 8001, 8002)


def test_variables_go_before_those_defaults_and_flags_before_both(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GATEWAY_HTTP_ADDRESS", "127.0.0.1")
    monkeypatch.setenv("GATEWAY_EXIT_ON_ERROR", "false")
    monkeypatch.setenv("GATEWAY_TOKEN_FILE", __file__)
    given = settings("--exit-on-error=true")
    assert (given.http_address, given.exit_on_error, given.insecure) == ("127.0.0.1", True, False)


def test_our_own_flags_are_passed_on():
    assert settings("--queue", "embedded", "--workers=2").workers == 2


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--grpc-keep", "1"], "option '--grpc-keep' is ambiguous"),
        (["--strict-readiness"], "option '--strict-readiness' needs a value"),
        (["--strict-readiness=maybe"], "--strict-readiness: invalid value 'maybe' for a boolean"),
        (["--disable-auto-complete-config=true"], "takes no value"),
        (["--reuse-http-port=true"], "--reuse-http-port and --reuse-grpc-port must be equal"),
        (["--backend-config=python,shm-region-prefix-name=x"], "only default-max-batch-size=N is"),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], text: str):
    assert text in refusal(*argv)


@pytest.mark.parametrize("argv", [["--model_repository=/x"], ["--nonsense"], ["--http-thread-count=8"], ["stray"], []])
def test_wrong_usage_ends_with_status_1_as_in_triton(argv: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.tritonserver(argv) == 1
    assert capsys.readouterr().err


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]):
    assert cli.tritonserver(["--help"]) == 0
    text = capsys.readouterr().out
    assert [name for name in tritonserver.FLAGS if f"--{name}" not in text] == []


def test_mutual_tls_does_not_need_the_other_flag():
    assert settings("--grpc-use-ssl-mutual=true", *TOGETHER["grpc-use-ssl-mutual"]).grpc_use_ssl is True


def test_whoever_listens_to_all_without_tokens_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cli, "_serve", lambda *_: 0)
    assert cli.tritonserver(BASE) == 0
    assert capsys.readouterr().err == tritonserver.OPEN + "\n"
    assert cli.tritonserver([*BASE, "--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]) == 0
    assert not capsys.readouterr().err
