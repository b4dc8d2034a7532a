"""What `deploy/` says, taken apart for tests: documents, containers, command lines and Dockerfile instructions."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = [*sorted((DEPLOY / "kubernetes").rglob("*.yaml")), *sorted((DEPLOY / "redis").glob("*.yaml"))]
OVERLAYS = sorted(path.parent for path in (DEPLOY / "kubernetes/overlays").rglob("kustomization.yaml"))
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
COMPOSE = DEPLOY / "compose.yaml"
UNITS = {path.name: path for path in (DEPLOY / "systemd/lockgate.service", DEPLOY / "edge/lockgate-edge.service")}
OURS = re.compile(r"lockgate:")

Document = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One `gateway ...` command line: where it stands, its words after `gateway`, and the variables set for it."""

    where: str
    words: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)

    def flags(self) -> list[str]:
        return [word.partition("=")[0] for word in self.words if word.startswith("--")]


def _load(text: str) -> list[Document]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML has it: ten times as fast
    return [each for each in yaml.load_all(text, loader) if each is not None]


def documents(path: Path) -> list[Document]:
    return _load(path.read_text())


@cache
def compose() -> Document:
    (document,) = documents(COMPOSE)
    return document


@cache
def written() -> dict[str, list[Document]]:
    """The Kubernetes objects as they stand in the files, without what overlays change."""
    found = [each for path in KUBERNETES if "overlays" not in path.parts for each in documents(path)]
    return {"written": [each for each in found if "kustomize" not in each["apiVersion"]]}


@cache
def rendered() -> dict[str, list[Document]]:
    """The objects of each overlay as kustomize makes them; none where there is no kubectl to ask."""
    if shutil.which("kubectl") is None:
        return {}
    return {path.name: _kustomize(path) for path in OVERLAYS}


def _kustomize(overlay: Path) -> list[Document]:
    done = subprocess.run(["kubectl", "kustomize", overlay], check=False, capture_output=True, text=True, timeout=15)
    assert done.returncode == 0, done.stderr
    return _load(done.stdout)


def renderings() -> dict[str, list[Document]]:
    return written() | rendered()


def templates(objects: list[Document]) -> dict[str, Document]:
    """The pod templates, by the name of what makes the pods."""
    return {
        each["metadata"]["name"]: each["spec"]["template"] for each in objects if "template" in each.get("spec", {})
    }


def containers(objects: list[Document]) -> dict[str, Document]:
    return {
        name: each
        for pod in templates(objects).values()
        for each in pod["spec"]["containers"]
        for name in [each["name"]]
    }


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, comments out and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in text.splitlines())]


def stages(path: Path) -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions(path):
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def unit(name: str = "lockgate.service") -> dict[str, list[str]]:
    """A unit's settings; one that is given twice has two values."""
    found: dict[str, list[str]] = {}
    for line in UNITS[name].read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def unit_variables(name: str) -> dict[str, str]:
    lines = UNITS[name].with_suffix(".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def commands() -> list[Command]:
    """Every command line in `deploy/`."""
    found = [Command(f"compose.yaml {name}", tuple(each["command"]), _environment(each))
             for name, each in compose()["services"].items() if OURS.match(each["image"])]  # fmt: skip
    for rendering, objects in renderings().items():
        found += [
            Command(f"kubernetes ({rendering}) {name}", tuple(each["args"]), _pod_environment(each))
            for name, each in containers(objects).items()
            if OURS.match(each["image"])
        ]
    for path in DOCKERFILES:
        last = dict(stages(path)[-1])
        found.append(Command(path.name, tuple(json.loads(last["CMD"]))))
    for where in UNITS:
        (line,) = unit(where)["ExecStart"]
        variables = unit_variables(where)
        for name, value in variables.items():
            line = line.replace(f"${{{name}}}", value)
        words = shlex.split(line)
        found.append(Command(where, tuple(words[1:]), variables))
    readme = (DEPLOY / "README.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("gateway "):
                found.append(Command(f"README.md: {line}", tuple(shlex.split(line)[1:])))
    return found


def _environment(service: Document) -> dict[str, str]:
    given = service.get("environment", {})
    return dict(each.split("=", 1) for each in given) if isinstance(given, list) else dict(given)


def _pod_environment(container: Document) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container.get("env", [])}
