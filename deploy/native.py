"""Compiles the gateway's one file of C when the package is installed, where there is a C compiler.

Without one, or with LOCKGATE_NATIVE=0, the package is installed without it and reads JSON with pysimdjson
alone; with LOCKGATE_NATIVE=1 that is an error instead. No Python header is needed, so one library serves every
version of Python.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("gateway/transport/http")
_COMPILERS = ("cc", "gcc", "clang")


class NativeHook(BuildHookInterface[Any]):
    """Puts `_arrays.so` beside `arrays.c`, and says for which platform the wheel then is."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Compile before the files of the wheel, or of an editable installation, are listed."""
        wanted = os.environ.get("LOCKGATE_NATIVE", "")
        source, library = (Path(self.root) / _FOLDER / name for name in ("arrays.c", "_arrays.so"))
        library.unlink(missing_ok=True)
        if wanted == "0" or not source.is_file():
            return
        problem = _compile(source, library)
        if problem and wanted == "1":
            raise RuntimeError(f"LOCKGATE_NATIVE=1, but arrays.c was not compiled: {problem}")
        if problem:
            self.app.display_warning(f"installed without compiled code, JSON will be read slower: {problem}")
            return
        build_data["artifacts"].append(f"/{_FOLDER}/{library.name}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _compile(source: Path, library: Path) -> str:
    """Compile; what went wrong, or nothing."""
    compiler = shlex.split(os.environ.get("CC", "")) or [next(filter(shutil.which, _COMPILERS), "")]
    if not shutil.which(compiler[0]):
        return f"no C compiler ({', '.join(_COMPILERS)})"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    made = library.with_name(f"{library.name}.{os.getpid()}")
    flags = ["-O3", "-shared", "-fPIC", f'-DLOCKGATE_SOURCE="{digest}"']
    try:
        done = subprocess.run(
            [*compiler, *flags, "-o", str(made), str(source)], check=False, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            return f"{compiler[0]} ended with {done.returncode}: {done.stderr}"
        made.replace(library)
    except (OSError, subprocess.SubprocessError) as problem:
        return str(problem)
    finally:
        made.unlink(missing_ok=True)
    return ""
