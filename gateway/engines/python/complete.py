"""Asks a model's `auto_complete_config` what its configuration lacks: in a process that ends with the answer.

`complete` is for the gateway, which never runs a model's code itself. Run as a program it is that process: it reads the
configuration as JSON and writes what became of it, or why there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gateway import errors
from gateway.child import mortal
from gateway.engines.python import utilities
from gateway.engines.python.configuration import ModelConfig
from gateway.engines.python.errors import TritonModelException
from gateway.engines.python.model import import_model

_SECONDS = 60.0


def complete(path: Path, config: str) -> str:
    """What the code in a file makes of a configuration, both as JSON; the same where the code has no say in it.

    Raises `InvalidArgument` for code that fails, or takes more than a minute.
    """
    command = mortal([sys.executable, "-m", "gateway.engines.python.complete", str(path)])
    try:
        done = subprocess.run(command, input=config.encode(), stdout=subprocess.PIPE, timeout=_SECONDS, check=False)  # noqa: S603 - our own program, given a path
    except subprocess.TimeoutExpired:
        raise errors.InvalidArgument(f"the code in '{path.name}' took more than {_SECONDS:.0f} s to load") from None
    try:
        told = json.loads(done.stdout)
    except ValueError:
        raise errors.InvalidArgument(
            f"the process that loads the code in '{path.name}' died (status {done.returncode})"
        ) from None
    if "error" in told:
        raise errors.InvalidArgument(told["error"])
    return json.dumps(told["config"])


def _completed(path: Path, config: str) -> dict[str, Any]:
    model = ModelConfig(config)
    name = str(model.as_dict().get("name", ""))
    try:
        utilities.install(name, path.parent, _refuse, _keep_none)
        kind = import_model(path.parent, path.name)
        fill = getattr(kind, "auto_complete_config", None)
        filled = model if fill is None else fill(model)
    except Exception as problem:  # noqa: BLE001 - the model's code may raise anything, which the operator must hear of
        return {"error": f"the code in '{path.name}' of model '{name}' failed: {type(problem).__name__}: {problem}"}
    if not isinstance(filled, ModelConfig):
        text = f"auto_complete_config must return the pb_utils.ModelConfig that it is given, it returned {type(filled)}"
        return {"error": f"the code in '{path.name}' of model '{name}' failed: {text}"}
    return {"config": filled.as_dict()}


def _refuse(_: object) -> Any:
    raise TritonModelException("BLS is supported only during the 'execute' function.")


def _keep_none(*_: object, **__: object) -> float:
    raise TritonModelException("metrics are supported only in a loaded model.")


if __name__ == "__main__":
    # What the code prints is for the log, not for the gateway.
    answer = os.dup(1)
    os.dup2(2, 1)
    told = _completed(Path(sys.argv[1]), sys.stdin.read())
    os.write(answer, json.dumps(told).encode())
    sys.stdout.flush()
    os._exit(0)  # whatever threads the code has started
