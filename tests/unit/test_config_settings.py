"""Settings from variables and flags, the refusals, and that each setting is documented."""

import re
import shlex
from pathlib import Path

import pytest

from gateway.config.arguments import flag, group, parse_args
from gateway.config.settings import Settings

BASE = ["--model-repository", "/models"]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GATEWAY_{name.upper()}", raising=False)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_args(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_tritonservers() -> None:
    settings = parse_args(BASE)
    assert settings.model_repository == (Path("/models"),)
    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (8000, 8001, 8002)
    assert settings.model_control_mode == "none"
    assert settings.server_id == "triton"
    assert settings.strict_readiness is True
    assert settings.exit_timeout_secs == 30
    assert settings.http_max_input_size == 67_108_864
    assert settings.grpc_keepalive_time == 7_200_000
    assert settings.grpc_http2_min_recv_ping_interval_without_data == 300_000
    assert {settings.http_address, settings.grpc_address, settings.metrics_address} == {"127.0.0.1"}


def test_a_tritonserver_command_line() -> None:
    line = (
        "--model-store=/a --model-repository /b --model-control-mode=explicit --load-model=x --load-model y "
        "--strict-readiness=false --exit-on-error true --id edge-7 --grpc-keepalive-time 1000 --log-verbose=1 "
        "--allow-metrics 0 --http-port=9000"
    )
    settings = parse_args(shlex.split(line))
    assert settings.model_repository == (Path("/a"), Path("/b"))
    assert settings.load_model == ("x", "y")
    assert (settings.strict_readiness, settings.exit_on_error, settings.allow_metrics) == (False, True, False)
    assert (settings.server_id, settings.http_port, settings.log_verbose) == ("edge-7", 9000, 1)


@pytest.mark.parametrize(
    ("argv", "size"),
    [
        ([], 0),
        (["--response-cache-bytes", "1048576"], 1 << 20),
        (["--cache-config", "local,size=1048576"], 1 << 20),
        (["--cache-config=local,size=1048576"], 1 << 20),
        (["--response-cache-byte-size=1048576"], 1 << 20),
    ],
)
def test_the_response_cache_in_tritons_words(argv: list[str], size: int) -> None:
    assert parse_args([*BASE, *argv]).response_cache_bytes == size


@pytest.mark.parametrize("value", ["redis,host=x", "local,size=", "local,size=-1", "local,ttl=1", "much"])
def test_a_response_cache_that_is_none(capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert "--response-cache-bytes (or GATEWAY_RESPONSE_CACHE_BYTES)" in refusal(capsys, *BASE, "--cache-config", value)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], True),
        (["--strict-readiness"], True),
        (["--strict-readiness=true"], True),
        (["--strict-readiness", "false"], False),
        (["--strict-readiness=False"], False),
        (["--strict-readiness=0"], False),
        (["--strict-readiness=false", "--strict-readiness"], True),
    ],
)
def test_every_way_to_write_a_boolean(argv: list[str], value: bool) -> None:
    assert parse_args([*BASE, *argv]).strict_readiness is value


def test_variables_and_flags_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MODEL_REPOSITORY", "/a:/b")
    monkeypatch.setenv("GATEWAY_MODEL_CONTROL_MODE", "explicit")
    monkeypatch.setenv("GATEWAY_LOAD_MODEL", "x,y")
    monkeypatch.setenv("GATEWAY_HTTP_PORT", "1234")
    monkeypatch.setenv("GATEWAY_GRPC_PORT", "1235")
    monkeypatch.setenv("GATEWAY_LOG_ACCESS", "true")
    monkeypatch.setenv("GATEWAY_TOKEN_FILE", "")
    settings = parse_args(["--http-port", "5"])
    assert settings.model_repository == (Path("/a"), Path("/b"))
    assert settings.load_model == ("x", "y")
    assert (settings.http_port, settings.grpc_port) == (5, 1235)
    assert settings.log_access is True
    assert settings.token_file is None


def test_settings_do_not_change() -> None:
    settings = Settings(model_repository=(Path("/a"),))
    with pytest.raises(ValueError, match="frozen"):
        settings.http_port = 1  # type: ignore[misc]


@pytest.mark.parametrize("field", ["http", "grpc", "metrics"])
@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.4", "gateway.example", ""])
def test_another_address_needs_a_token_or_insecure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, field: str, address: str
) -> None:
    if (field, address) == ("metrics", ""):
        return  # follows --http-address
    argv = [*BASE, f"--{field}-address={address}"]
    message = refusal(capsys, *argv)
    assert f"--{field}-address {address} can be reached from other machines" in message
    assert "--token-file" in message
    assert "--insecure" in message
    tokens = tmp_path / "tokens"
    tokens.write_text("a:b\n")
    assert parse_args([*argv, "--insecure"]).insecure
    assert parse_args([*argv, "--token-file", str(tokens)]).token_file == tokens
    assert parse_args([*argv, f"--allow-{field}=false", *([] if field != "http" else ["--metrics-address=::1"])])


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_neither(address: str) -> None:
    settings = parse_args([*BASE, f"--http-address={address}", f"--grpc-address={address}"])
    assert settings.metrics_address == address


def test_client_certificates_stand_in_for_tokens_on_grpc_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pem = tmp_path / "a.pem"
    pem.write_text("x")
    tls = ["--grpc-use-ssl", "--grpc-use-ssl-mutual"]
    tls += [f"--grpc-{name}={pem}" for name in ("server-cert", "server-key", "root-cert")]
    assert parse_args([*BASE, "--grpc-address=::", *tls]).grpc_use_ssl_mutual
    assert "--http-address" in refusal(capsys, *BASE, "--http-address=::", *tls)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model-repository (or GATEWAY_MODEL_REPOSITORY) must be given"),
        ([*BASE, "--http-prot", "1"], "unknown option --http-prot; did you mean --http-port?"),
        ([*BASE, "--zzz"], "unknown option --zzz; see --help"),
        ([*BASE, "--http"], "unknown option --http; "),
        ([*BASE, "--http-port", "abc"], "--http-port (or GATEWAY_HTTP_PORT): input should be a valid integer"),
        ([*BASE, "--http-port", "70000"], "less than or equal to 65535, got '70000'"),
        ([*BASE, "--log-format", "xml"], "input should be 'text' or 'json', got 'xml'"),
        (
            [*BASE, "--strict-readiness=maybe"],
            "--strict-readiness (or GATEWAY_STRICT_READINESS): input should be a val",
        ),
        ([*BASE, "--load-model", "a"], "--load-model needs --model-control-mode explicit"),
        ([*BASE, "--model-control-mode=explicit", "--load-model=*", "--load-model=a"], "give it alone"),
        ([*BASE, "--token-file", "/nowhere"], "path does not point to a file, got '/nowhere'"),
        ([*BASE, "--http-tls-cert", __file__], "--http-tls-cert and --http-tls-key belong together"),
        ([*BASE, "--grpc-use-ssl"], "--grpc-use-ssl needs --grpc-server-cert and --grpc-server-key"),
        ([*BASE, "--grpc-use-ssl-mutual"], "--grpc-use-ssl-mutual needs --grpc-use-ssl and --grpc-root-cert"),
        ([*BASE, "--model-config-name", "../x"], "--model-config-name"),
        ([*BASE, "--default-deadline-ms=-1"], "--default-deadline-ms (or GATEWAY_DEFAULT_DEADLINE_MS)"),
        ([*BASE, "--default-deadline-ms=nan"], "--default-deadline-ms (or GATEWAY_DEFAULT_DEADLINE_MS)"),
        ([*BASE, "--tenant-header", "x tenant"], "--tenant-header (or GATEWAY_TENANT_HEADER)"),
        ([*BASE, "--record-inputs"], "--record-inputs needs --record DIR"),
        (
            [*BASE, "--allow-client-shm", "--queue=embedded", "--http-workers=2", "--queue-shared-memory=false"],
            "--allow-client-shm needs one process",
        ),
        ([*BASE, "--allow-client-shm", "--share-ports"], "--allow-client-shm needs one process"),
        ([*BASE, "--record=/r", "--record-sample=1.5"], "--record-sample (or GATEWAY_RECORD_SAMPLE)"),
        ([*BASE, "--record=/r", "--record-max-bytes=0"], "--record-max-bytes (or GATEWAY_RECORD_MAX_BYTES)"),
    ],
)
def test_refusals_say_what_to_do(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in refusal(capsys, *argv)


def test_all_problems_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--http-port=x", "--grpc-port=y")
    assert all(name in message for name in ("--model-repository", "--http-port", "--grpc-port"))


def test_every_setting_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, field in Settings.model_fields.items():
        assert flag(name) in shown
        assert field.description
        assert group(field) in shown
        # argparse breaks lines at hyphens.
        assert field.description.replace(" ", "") in shown.replace(" ", "")


def test_one_gateway_of_a_supervisor_may_use_shared_memory() -> None:
    fleet = ["--queue=redis://localhost", "--workers=2", "--allow-client-shm"]
    assert parse_args([*BASE, *fleet]).allow_client_shm
    assert parse_args([*BASE, *fleet, "--workers=1", "--share-ports", "--status-fd=1"]).allow_client_shm
