"""The command line of the model recipes: `python -m gateway.build.zoo [MODEL...] [--out model_repo]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gateway.build.zoo import RECIPES, BuildError


def main(arguments: list[str] | None = None) -> int:
    """Rebuild the named models, or all of them; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway.build.zoo", description="Rebuild the models of model_repo/."
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"from {', '.join(RECIPES)}; all when none is named")
    parser.add_argument("--out", type=Path, default=Path("model_repo"), help="the model repository to write into")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models if name not in RECIPES]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; choose from {', '.join(RECIPES)}")
    try:
        for name in options.models or RECIPES:
            _rebuild(name, options.out)
    except ModuleNotFoundError as error:
        # torch and the others are optional, so a missing one is a step the user has not taken yet, not a fault.
        sys.stderr.write(f"module {error.name!r} is not installed: pip install 'lockgate[models]'\n")
        return 2
    except BuildError as error:
        sys.stderr.write(f"not written: {error}\n")
        return 1
    return 0


def _rebuild(name: str, repository: Path) -> None:
    started = time.monotonic()
    models, report = RECIPES[name]()
    sys.stdout.write(f"{name}: {report} [{time.monotonic() - started:.0f} s]\n")
    for model in models:
        folder = model.write(repository)
        sys.stdout.write(f"  {folder}: {len(model.onnx):,} bytes\n")


if __name__ == "__main__":
    sys.exit(main())
