"""How remote repositories are written, and how to sign in at their stores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.config.arguments import parse_args
from gateway.config.credentials import VARIABLE, credentials
from gateway.config.environment import cache_folder
from gateway.config.locations import Location, folders, read_place, split_places
from gateway.errors import InvalidArgument
from gateway.repository.remote import store


@pytest.mark.parametrize(
    ("text", "location", "url"),
    [
        ("s3://bucket", Location("s3", "bucket"), "s3://bucket"),
        ("s3://bucket//path/to/", Location("s3", "bucket/path/to"), "s3://bucket/path/to"),
        ("s3://host:9000/bucket/path", Location("s3", "bucket/path", "http://host:9000"), None),
        ("s3://http://10.0.0.1:9000/bucket", Location("s3", "bucket", "http://10.0.0.1:9000"), None),
        ("s3://https://host:443/bucket/a.b/c", Location("s3", "bucket/a.b/c", "https://host:443"), None),
        ("s3://https://store.example/bucket", Location("s3", "bucket", "https://store.example"), None),
        ("gs://bucket/path", Location("gs", "bucket/path"), "gs://bucket/path"),
        ("as://account/container/path", Location("as", "container/path", "account"), "as://account/container/path"),
        ("hf://owner/name@v1/models", Location("hf", "owner/name@v1/models"), "hf://owner/name@v1/models"),
    ],
)
def test_places_as_triton_writes_them(text: str, location: Location, url: str | None) -> None:
    assert read_place(text) == location
    assert location.url == (url or f"s3://{location.host}/{location.path}")
    assert read_place(location.url) == location
    assert location.name == location.path.split("/")[-1]


@pytest.mark.parametrize(
    "text",
    ["s3://", "s3:///", "s3://host:9000", "s3://host:9000/", "gs://", "as://account", "hf://owner", "s3://b/../c"],
)
def test_a_place_that_is_not_written_as_it_should_be(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"must be a folder or {text[:2]}://"):
        read_place(text)
    with pytest.raises(SystemExit):
        parse_args(["--model-repository", text])
    assert f"--model-repository (or GATEWAY_MODEL_REPOSITORY): value error, must be a folder or {text[:2]}" in (
        capsys.readouterr().err.replace("\n", " ")
    )


def test_a_variable_holds_several(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "/models:s3://bucket/a:s3://https://host:9000/bucket/b:rel:gs://bucket:as://account/container"
    monkeypatch.setenv("GATEWAY_MODEL_REPOSITORY", text)
    places = parse_args([]).model_repository
    assert split_places(text) == [str(place) if isinstance(place, Path) else place.url for place in places]
    assert places[0] == Path("/models")
    assert places[2] == Location("s3", "bucket/b", "https://host:9000")
    with pytest.raises(InvalidArgument, match="'s3://bucket/a' is no folder of this machine"):
        folders(places)
    assert folders(places[:1]) == [Path("/models")]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["promote", "m"], ["models", "lint"], ["models", "new", "x.onnx"]])
def test_commands_for_folders_say_so(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *command, "--model-repository", "s3://bucket/models"],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, "'s3://bucket/models' is no folder of this machine" in done.stderr) == (1, True)


@pytest.mark.parametrize("scheme", ["s3", "gs", "as", "hf"])
def test_a_store_whose_package_is_missing_names_the_command(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"s3": "s3fs", "gs": "gcsfs", "as": "adlfs", "hf": "huggingface_hub"}[scheme]
    monkeypatch.setattr(store.importlib.util, "find_spec", lambda name: None if name == found else object())
    location = read_place(f"{scheme}://a/b/c")
    assert isinstance(location, Location)
    with pytest.raises(InvalidArgument) as caught:
        store.require_driver(location)
    assert caught.value.message == (
        f"model repository '{location.url}' needs the package {found}: pip install 'lockgate[remote]'"
    )


@pytest.mark.slow
def test_a_gateway_without_the_package_does_not_start(tmp_path: Path) -> None:
    hidden = "import importlib.util as u, runpy; f = u.find_spec\n"
    hidden += "u.find_spec = lambda name, *more: None if name == 's3fs' else f(name, *more)\n"
    hidden += "runpy.run_module('gateway', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "serve", "--model-repository", "s3://bucket/models", "--http-port", "0"],
        check=False, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs the package s3fs: pip install 'lockgate[remote]'" in done.stderr


def test_the_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/lockgate")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert cache_folder() == Path("/home/x/.cache/lockgate")


# --- credentials


BUCKET = Location("s3", "bucket/models")


def test_the_environment_signs_in() -> None:
    environ = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu",
        "AWS_PROFILE": "",
    }
    assert credentials(BUCKET, environ) == {"key_id": "id", "secret_key": "secret", "region": "eu"}
    assert credentials(Location("gs", "b"), {"GOOGLE_APPLICATION_CREDENTIALS": "/f"}) == {"path": "/f"}
    azure = {"AZURE_STORAGE_ACCOUNT": "a", "AZURE_STORAGE_KEY": "k"}
    assert credentials(Location("as", "c", "a"), azure) == {"account_str": "a", "account_key": "k"}
    assert credentials(Location("hf", "o/n"), {"HF_TOKEN": "t"}) == {"token": "t"}


def test_the_longest_entry_of_tritons_file_that_fits_signs_in(tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    file.write_text(
        json.dumps(
            {
                "s3": {
                    "": {"key_id": "any", "secret_key": "x", "session_token": ""},
                    "s3://bucket": {"key_id": "bucket"},
                    "s3://bucket/models/": {"key_id": "models"},
                    "s3://host:9000/bucket": {"key_id": "host"},
                },
                "gs": {"gs://bucket-2": "/two.json"},
            }
        )
    )
    environ = {VARIABLE: str(file), "AWS_ACCESS_KEY_ID": "of the environment", "GOOGLE_APPLICATION_CREDENTIALS": "/env"}

    def key(url: str) -> str:
        location = read_place(url)
        assert isinstance(location, Location)
        found = credentials(location, environ)
        return found.get("key_id", found.get("path", ""))

    assert key("s3://other") == key("s3://bucketeer/models") == "any"
    assert key("s3://bucket/more") == key("s3://bucket") == "bucket"
    assert key("s3://bucket/models") == key("s3://bucket/models/deep") == "models"
    assert key("s3://host:9000/bucket/x") == key("s3://http://host:9000/bucket") == "host"
    assert key("gs://bucket-2/models") == "/two.json"
    assert key("gs://bucket-3/models") == "/env"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file cannot be read: No such file or directory"),
        ("{secret", "the file is not JSON"),
        ("[]", "the file must hold an object for each of gs, s3, as"),
        ('{"s3": ["secret"]}', "the file must hold an object for each of gs, s3, as"),
        ('{"s3": {"": {"key_id": 1}}}', "what it has for 's3://bucket/models' must be an object of strings"),
    ],
)
def test_a_file_that_is_none_is_said_to_be_and_not_shown(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "credentials.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidArgument) as caught:
        credentials(BUCKET, {VARIABLE: str(file)})
    assert caught.value.message.startswith(f"{VARIABLE}: {message}")
    assert "secret" not in caught.value.message


KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "token"}


@pytest.mark.parametrize(
    ("url", "environ", "package", "options"),
    [
        ("s3://host:9000/bucket", KEYS, "s3fs",
         {"key": "id", "secret": "secret", "token": "token", "endpoint_url": "http://host:9000"}),
        ("s3://bucket", {"AWS_PROFILE": "p", "AWS_DEFAULT_REGION": "eu"}, "s3fs",
         {"profile": "p", "client_kwargs": {"region_name": "eu"}}),
        ("s3://bucket", KEYS | {"AWS_PROFILE": "p"}, "s3fs", {"key": "id", "secret": "secret", "token": "token"}),
        ("gs://bucket", {"GOOGLE_APPLICATION_CREDENTIALS": "/f"}, "gcsfs", {"token": "/f", "access": "read_only"}),
        ("as://account/container", {"AZURE_STORAGE_KEY": "k"}, "adlfs",
         {"account_name": "account", "account_key": "k", "anon": False}),
        ("as://account.example:10000/container", {}, "adlfs",
         {"account_name": "account", "account_host": "account.example:10000", "anon": False}),
        ("hf://owner/name", {"HF_TOKEN": "t"}, "huggingface_hub", {"token": "t"}),
    ],
)  # fmt: skip
def test_drivers_are_opened_with_what_signs_in(url, environ, package, options, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, object]] = []

    class Driver:
        def __init__(self, **more: object) -> None:
            made.append(more)

        def _strip_protocol(self, path: str) -> str:
            return path

    class Module:
        def __getattr__(self, name: str) -> type[Driver]:
            return Driver

    monkeypatch.setattr(store.importlib, "import_module", lambda name: {package: Module()}[name])
    location = read_place(url)
    assert isinstance(location, Location)
    store.connect(location, credentials(location, environ))
    config = made[0].pop("config_kwargs", {})
    assert made == [{**options, "skip_instance_cache": True, "use_listings_cache": False}]
    assert (config.get("connect_timeout") == 5) is url.startswith("s3")
    assert (config.get("s3") == {"addressing_style": "path"}) is (":9000" in url)


@pytest.mark.parametrize("scheme", ["s3", "gs", "as", "hf"])
def test_the_drivers_take_these_options(scheme: str) -> None:
    location = read_place(f"{scheme}://a/b")
    assert isinstance(location, Location)
    try:
        store.require_driver(location)
    except InvalidArgument as missing:
        pytest.skip(missing.message)
    environ = {**KEYS, "AZURE_STORAGE_KEY": "aw==", "HF_TOKEN": "t"}
    assert isinstance(store.connect(location, credentials(location, environ)), store.Store)
