"""Reads a model from its folder into a `ModelSource`: all that a worker needs to load it.

Promises that a `ModelSource` is complete and checked, so that what can still fail is the model file itself,
and that a refusal names file, line and remedy. Loads nothing: `describe`, given by the application, is how
it learns the inputs and outputs that a configuration leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from gateway.config.build import build
from gateway.config.complete import adopt, complete, fill_backend
from gateway.config.fit import check_fit
from gateway.config.model import ModelConfig, ModelConfigProto
from gateway.config.parse import Source, config_json, empty, parse_json, parse_text
from gateway.config.support import require_supported, warnings
from gateway.errors import GatewayError, InvalidArgument, NotFound
from gateway.repository import layout
from gateway.repository.fingerprint import Changes, Fingerprint, diff, digest
from gateway.repository.roots import LocalRoot, ModelFiles, Root
from gateway.repository.uploaded import FILE, uploaded
from gateway.telemetry import Family
from gateway.types import ModelIO

AskRemote: TypeAlias = Callable[[str, Mapping[str, str]], ModelConfigProto]
"""A model's name and parameters to its configuration on the server that they name. Blocking. Raises `GatewayError`."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as the repository has it now.

    `versions` are the folders that the version policy chooses, by number, lowest first. `warnings` say what
    of the folder or its configuration has no effect. `digests` tell what each version computes, for models whose
    responses are cached: equal ones, on whatever machine, give equal answers.
    """

    name: str
    config: ModelConfig
    versions: Mapping[int, Path]
    warnings: tuple[str, ...]
    fingerprint: Fingerprint
    digests: Mapping[int, str] = field(default_factory=dict)
    lease: object = None  # keeps the folders here for as long as anyone holds it


AutoComplete: TypeAlias = Callable[[Path, str], str]
"""What a Python model's own `auto_complete_config` makes of its configuration, both as JSON. Raises `GatewayError`."""

_COMPLETED = ("max_batch_size", "dynamic_batching", "input", "output", "model_transaction_policy")


class Repository:
    """The models of one or more places. Holds no state of its own: every call reads the files as they are."""

    def __init__(
        self,
        roots: Sequence[Path | Root],
        describe: Callable[[Path], ModelIO],
        *,
        backends: Collection[str] = ("onnxruntime", "tensorrt", "fake"),
        gpus: Sequence[int] = (),
        default_max_batch_size: int = 4,
        config_name: str = "",
        caches: bool = False,
    ) -> None:
        """`roots` are the places, a path for a folder of this machine. `describe` reads inputs and outputs from an ONNX file; `backends` are the engines there are; `gpus`
        the ids of the usable GPUs; `config_name` picks `configs/<config_name>.pbtxt` where a model has it. Without
        `caches` nobody keeps responses, and models that ask for it are warned of.
        """
        self._roots = tuple(LocalRoot(root) if isinstance(root, Path) else root for root in roots)
        self._describe = describe
        self._ask_remote: AskRemote | None = None
        self._backends = frozenset(backends)
        self._auto_complete: AutoComplete | None = None
        self._gpus = tuple(gpus)
        self._default_max_batch_size = default_max_batch_size
        self._config_name = config_name
        self._caches = caches
        self._completes = True
        self._limits_rates = False

    @property
    def backends(self) -> frozenset[str]:
        """The backends whose models are read."""
        return self._backends

    def require_complete(self) -> None:
        """Refuse models whose configurations leave out inputs or outputs."""
        self._completes = False

    def limit_rates(self) -> None:
        """Read the rate limiters of instance groups without a warning that they have no effect."""
        self._limits_rates = True

    def allow_remote(self, ask: AskRemote) -> None:
        """Read models of backend `remote`, and ask their servers what their configurations leave out."""
        self._backends |= {"remote"}
        self._ask_remote = ask

    def allow_python(self, auto_complete: AutoComplete) -> None:
        """Have models of backend python too, which are code."""
        self._backends |= {"python"}
        self._auto_complete = auto_complete

    def scan(self) -> dict[str, tuple[Root, ...]]:
        """Every model in name order, and where it is: in more than one place when they disagree about who has it.

        Raises `GatewayError` when one of them cannot be read.
        """
        found: dict[str, tuple[Root, ...]] = {}
        for root in self._roots:
            for name in root.models():
                found[name] = (*found.get(name, ()), root)
        return {name: found[name] for name in sorted(found)}

    def changes(self, previous: Mapping[str, Fingerprint]) -> Changes:
        """What has changed since `previous`, the `now` of an earlier call."""
        prints: dict[str, list[Fingerprint]] = {}
        for root in self._roots:
            for name, found in root.fingerprints().items():
                prints.setdefault(name, []).append(found)
        now = {
            name: prints[name][0] if len(prints[name]) == 1 else Fingerprint(repr(prints[name]), {})
            for name in sorted(prints)
        }
        return diff(previous, now)

    def folder(self, name: str) -> Path:
        """Where a model's configuration lies here. Raises as `read` does."""
        return self._open(name).folder

    def metrics(self) -> list[Family]:
        """What there is to tell of the places themselves, each metric once."""
        told: dict[str, Family] = {}
        for family in (family for root in self._roots for family in root.metrics()):
            told.setdefault(family.name, replace(family, samples=[])).samples.extend(family.samples)
        return [*told.values()]

    def read(self, name: str, parameters: Mapping[str, str] | None = None) -> ModelSource:
        """Read one model. `parameters` are a load request's: `config` is JSON used in place of the file, and each
        `file:PATH` a file in base64, which are all that the model then has.

        Raises `NotFound` for a name that is in no repository, `Unavailable` for files that cannot be read, `Internal`
        for files of a request that cannot be a model, and otherwise `InvalidArgument` or `Unsupported` with file, line
        and remedy.
        """
        override = _override(parameters or {})
        files = uploaded(name, parameters or {}) or self._open(name)
        folder = files.folder
        source = None if override else layout.config_source(folder, self._config_name)
        source = source or Source("model configuration")
        proto = parse_json(override) if override else parse_text(source) if source.text else empty()
        if proto.name not in ("", name):
            raise source.error(layout.misnamed(name, proto.name), "name")
        wanted, absent = _choose(proto, name, files.numbers, source)
        proto = fill_backend(proto, name, files.contents(wanted[-1]))
        if override:
            _check_override(proto, source)
        require_supported(proto, self._backends, source)
        chosen = files.fetch(wanted)
        config = self._config(proto, chosen[wanted[-1]].parent, chosen, source)
        texts = [*files.ignored, *absent, *warnings(proto, source)]
        cached = config.response_cache is not None
        texts += self._unheeded(config, source)
        return ModelSource(
            name=name,
            config=config,
            versions=chosen,
            warnings=tuple(texts),
            fingerprint=files.fingerprint(override),
            digests={number: digest(path, config.proto) for number, path in chosen.items()}
            if cached and not _is_remote(config)
            else {},
            lease=files.lease,
        )

    def _unheeded(self, config: ModelConfig, source: Source) -> Iterator[str]:
        """What the settings of this server leave without effect."""
        if not self._limits_rates and any(group.limiter for group in config.instance_groups):
            text = (
                "rate_limiter has no effect without --rate-limit execution_count. Instances share a device by its slots"
            )
            yield source.describe(text, "instance_group", "rate_limiter")
        if config.response_cache is not None and (why := self._uncached(config)):
            yield source.describe(f"response_cache has no effect {why}. Every request is computed", "response_cache")

    def _uncached(self, config: ModelConfig) -> str:
        """Why nobody keeps the responses of a model that asks for it; empty if they are kept."""
        if _is_remote(config):
            return "on a model of another server, which may change there"
        return "" if self._caches else "without --response-cache-bytes"

    def _open(self, name: str) -> ModelFiles:
        found = [(root, files) for root in self._roots if (files := root.open(name)) is not None]
        if not found:
            raise NotFound(f"model '{name}' is in no model repository")
        if len(found) > 1:
            places = ", ".join(f"'{root.name}'" for root, _ in found)
            raise InvalidArgument(
                f"model '{name}' appears in two or more repositories ({places}); rename or remove all but one"
            )
        return found[0][1]

    def _config(self, proto: ModelConfigProto, folder: Path, chosen: Mapping[int, Path], source: Source) -> ModelConfig:
        model = _model_file(proto, folder, chosen, source)
        self._require_complete(proto, source)
        if model is not None and proto.backend == "python":
            proto = self._complete_code(proto, model, source)
        io = None
        if proto.backend == "remote" and self._ask_remote is not None and not (proto.input and proto.output):
            parameters = {key: value.string_value for key, value in proto.parameters.items()}
            proto = adopt(proto, self._ask_remote(folder.name, parameters))
        if model is not None and not (proto.input and proto.output):
            io = self._describe_file(model, folder)
            proto = complete(proto, io, self._default_max_batch_size, source)
        config = build(proto, source, gpus=self._gpus, labels=_labels(proto, folder, source))
        if io is not None:
            check_fit(config, io)
        for sample in config.warmup:
            for data in sample.inputs.values():
                if data.source not in ("zero", "random"):
                    _existing(folder / "warmup", data.source, folder.parent, source, "input_data_file")
        return config

    def _require_complete(self, proto: ModelConfigProto, source: Source) -> None:
        if not self._completes and not (proto.input and proto.output):
            raise source.error(
                f"model '{proto.name}' must specify 'input' and 'output': with --disable-auto-complete-config nothing is "
                "filled in from the model file"
            )

    def _complete_code(self, proto: ModelConfigProto, model: Path, source: Source) -> ModelConfigProto:
        """The configuration as the model's code completes it; other fields than Triton allows stay as they are."""
        assert self._auto_complete is not None
        if not self._completes:
            return proto
        if proto.input and proto.output and not _mentions(model.parent.parent, b"auto_complete_config"):
            return proto
        try:
            completed = json.loads(self._auto_complete(model, json.dumps(config_json(proto))))
        except GatewayError as problem:
            raise source.error(problem.message) from None
        whole = config_json(proto) | {key: completed[key] for key in _COMPLETED if key in completed}
        return parse_json(json.dumps(whole))

    def _describe_file(self, model: Path, folder: Path) -> ModelIO:
        where = Path(*model.parts[len(folder.parts) - 1 :])  # it may be in another version's folder
        try:
            return self._describe(model)
        except GatewayError as problem:
            raise InvalidArgument(f"{where}: {problem.message}") from None
        except Exception as problem:  # noqa: BLE001 - a broken file makes its reader raise anything
            text = str(problem).replace(str(model), model.name)
            raise InvalidArgument(
                f"{where} cannot be read: {text}. Check that the file is a whole ONNX model"
            ) from None


def _mentions(folder: Path, word: bytes) -> bool:
    """Whether any code in a model's folder may have the word."""
    try:
        return any(word in path.read_bytes() for path in folder.rglob("*.py") if path.is_file())
    except OSError:
        return True  # what cannot be read may


def _override(parameters: Mapping[str, str]) -> str:
    for key in parameters:
        if key != "config" and not key.startswith(FILE):
            raise InvalidArgument(f"unexpected load parameter '{key}'; expected 'config' or '{FILE}<path>'")
    return parameters.get("config", "")


def _is_remote(config: ModelConfig) -> bool:
    """Whether another server computes the answers, or some of them."""
    return config.backend == "remote" or any(key.endswith("remote.url") for key in config.parameters)


def _check_override(proto: ModelConfigProto, source: Source) -> None:
    if proto.backend == "fake":
        # Anyone who may load models could otherwise have one that crashes on request.
        raise source.error("backend 'fake' is for tests; it is loaded from a repository and not by an override")
    if proto.backend == "python":
        # Its author says what of the repository is code; whoever may load models does not.
        raise source.error("a model of backend 'python' is loaded as its config.pbtxt says and not by an override")
    if proto.backend == "remote" or any("remote" in key for key in proto.parameters):
        # They could have this server call any other, and send it the files that the parameters name.
        raise source.error("a remote server is named in a repository's config.pbtxt and not by an override")


def _choose(proto: ModelConfigProto, name: str, numbers: Sequence[int], source: Source) -> tuple[list[int], list[str]]:
    """The versions that the policy chooses, lowest first, and a warning for each that it names and that is not there."""
    if not numbers:
        raise InvalidArgument(f"model '{name}' has no version folder; put its model file into {name}/1/")
    policy = proto.version_policy
    kind = policy.WhichOneof("policy_choice")
    wanted = list(numbers)
    if kind == "specific":
        wanted = sorted(set(policy.specific.versions))
    elif kind != "all":
        wanted = wanted[-max(policy.latest.num_versions, 1) :]
    absent = [number for number in wanted if number not in numbers]
    if len(absent) == len(wanted):
        raise source.error(
            f"at least one version must be available under the version policy of model '{name}'; there are: "
            f"{', '.join(map(str, numbers))}",
            "version_policy",
        )
    texts = [
        source.describe(f"version {number} is specified and folder '{name}/{number}' is not there", "version_policy")
        for number in absent
    ]
    return [number for number in wanted if number in numbers], texts


def _model_file(proto: ModelConfigProto, folder: Path, chosen: Mapping[int, Path], source: Source) -> Path | None:
    """The model file of the newest version that has it; None for a backend without files."""
    name = proto.default_model_filename
    if not name:
        return None
    files = [layout.below(chosen[number], name, folder.parent) for number in sorted(chosen, reverse=True)]
    if None in files:
        raise _leaves(name, source, "default_model_filename")
    # A version whose file is missing fails by itself when it is loaded; here it must not stop the others.
    if there := [path for path in files if path is not None and path.exists()]:
        return there[0]
    newest = chosen[max(chosen)]
    holds = ", ".join(layout.names(newest)) or "nothing"
    raise source.error(
        f"'{folder.name}/{newest.name}/{name}' is not there; the folder holds: {holds}. Put the model file there, or "
        "set default_model_filename",
        "default_model_filename",
    )


def _labels(proto: ModelConfigProto, folder: Path, source: Source) -> dict[str, tuple[str, ...]]:
    """The class names of each output that has a label_filename: one a line, in index order."""
    labels = {}
    for output in proto.output:
        if output.label_filename:
            path = _existing(folder, output.label_filename, folder.parent, source, "label_filename")
            labels[output.name] = tuple(layout.read_text(path, output.label_filename).splitlines())
    return labels


def _existing(base: Path, name: str, repository: Path, source: Source, field: str) -> Path:
    path = layout.below(base, name, repository)
    if path is None:
        raise _leaves(name, source, field)
    if not path.is_file():
        raise source.error(
            f"{field} '{name}' is not in folder '{base.name}'; put it there or remove {field}", field, name
        )
    return path


def _leaves(name: str, source: Source, field: str) -> InvalidArgument:
    return source.error(f"{field} '{name}' leads out of the model repository; use a name inside it", field, name)
