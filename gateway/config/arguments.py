"""The command line of `gateway serve`, generated from the fields of `Settings`.

Takes what a tritonserver command line may say: `--strict-readiness=true`, `--strict-readiness false` and the bare
`--insecure`, `--model-store` for `--model-repository`, `--id` for `--server-id`. A flag wins over its variable.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import FilePath, NonNegativeInt, ValidationError
from pydantic.fields import FieldInfo

from gateway.config.settings import Settings

_METAVARS: dict[Any, str] = {
    int: "N",
    float: "N",
    NonNegativeInt | None: "N",
    FilePath | None: "FILE",
    Path | None: "DIR",
}
_ALIASES = {
    "model_repository": ["--model-store"],
    "server_id": ["--id"],
    "response_cache_bytes": ["--cache-config", "--response-cache-byte-size"],
}


def parse_args(argv: Sequence[str], prog: str = "gateway serve") -> Settings:
    """Read flags and `GATEWAY_*` variables. Prints the problem and raises `SystemExit` 2 on a bad one."""
    parser = _parser(prog)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(word, map(flag, Settings.model_fields), 1)
        parser.error(f"unknown option {word}; " + (f"did you mean {close[0]}?" if close else "see --help"))
    try:
        return Settings(**vars(values))
    except ValidationError as error:
        parser.error("\n  ".join(_explain(problem) for problem in error.errors()))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serve a folder of models over HTTP and gRPC.",
        epilog="Each option can also be set by a variable: --http-port by GATEWAY_HTTP_PORT, and so on.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        usage=f"{prog} --model-repository DIR [options]",
    )
    groups: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        title = group(field)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag(name), *_ALIASES.get(name, []), dest=name, **_options(field))
    return parser


def flag(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def group(field: FieldInfo) -> str:
    """The heading that a setting stands under in --help."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])


def _options(field: FieldInfo) -> dict[str, Any]:
    text = (field.description or "").replace("%", "%%")
    if field.default not in (None, "", ()) and not field.is_required():
        text += f" (default: {str(field.default).lower() if isinstance(field.default, bool) else field.default})"
    kind = field.annotation
    if kind is bool:
        return {"help": text, "nargs": "?", "const": "true", "metavar": "true|false"}
    if get_origin(kind) is Literal:
        return {"help": text, "metavar": "|".join(get_args(kind))}
    if get_origin(kind) is tuple:
        return {"help": text, "action": "append", "metavar": "DIR" if "folder" in text else "NAME"}
    return {"help": text, "metavar": _METAVARS.get(kind, "TEXT")}


def _explain(problem: Any) -> str:
    if not problem["loc"]:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    where = f"{flag(name)} (or GATEWAY_{name.upper()})"
    if problem["type"] == "missing":
        return f"{where} must be given"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"
