"""Compiles the gateway's one file of C when the package is installed, where there is a C compiler.

Without one, or with LOCKGATE_NATIVE=0, the package is installed without it and reads JSON with pysimdjson
alone; with LOCKGATE_NATIVE=1 that is an error instead. No Python header is needed, so one library serves every
version of Python. `CC` names another compiler; one for another machine wants _PYTHON_HOST_PLATFORM as well.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("gateway/transport/http")
_NAME = "_arrays.so"
_COMPILERS = ("cc", "gcc", "clang")


class NativeHook(BuildHookInterface[Any]):
    """Puts `_arrays.so` beside `arrays.c`: in the wheel, or in the source tree of an editable installation."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files of the wheel are listed."""
        wanted = os.environ.get("LOCKGATE_NATIVE", "")
        source = Path(self.root) / _FOLDER / "arrays.c"
        if version == "editable":
            with suppress(OSError):  # one that nobody may remove is used only if it fits the source
                source.with_name(_NAME).unlink()
        if wanted == "0" or not source.is_file():
            return
        self._made = tempfile.TemporaryDirectory()
        library = Path(self._made.name, _NAME)
        try:
            _compile(source, library)
            if version == "editable":
                shutil.copy(library, source.with_name(_NAME))
                return
        except (OSError, ValueError, subprocess.SubprocessError) as problem:
            if wanted == "1":
                raise RuntimeError(f"LOCKGATE_NATIVE=1, but arrays.c was not compiled: {problem}") from problem
            self.app.display_warning(f"installed without compiled code, JSON will be read slower: {problem}")
            return
        build_data["force_include"][str(library)] = (_FOLDER / _NAME).as_posix()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{self.build_config.builder.get_best_matching_tag().rsplit('-', 1)[1]}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - hatchling's signature
        """The wheel is written."""
        if hasattr(self, "_made"):
            self._made.cleanup()


def _compile(source: Path, library: Path) -> None:
    """Raises OSError, ValueError or SubprocessError."""
    compiler = shlex.split(os.environ.get("CC", "")) or [next(filter(shutil.which, _COMPILERS), "")]
    if not shutil.which(compiler[0]):
        raise OSError(f"no C compiler ({', '.join(_COMPILERS)})")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()  # see arrays.py
    flags = ["-O3", "-shared", "-fPIC", f'-DLOCKGATE_SOURCE="{digest}"']
    done = subprocess.run(
        [*compiler, *flags, "-o", str(library), str(source)],
        check=False, capture_output=True, text=True, errors="replace", timeout=120,
    )  # fmt: skip
    if done.returncode or not library.is_file():
        raise OSError(f"{compiler[0]} ended with {done.returncode}: {done.stderr}")
