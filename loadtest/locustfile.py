"""Locust's entry: users, options, the shape of the load, and the result file. See loadtest/README.md for the commands."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the `locust` command does not look in the checkout

from locust import LoadTestShape, events

from loadtest import grpc_users
from loadtest.grpc_users import GrpcUser
from loadtest.http_users import HttpBinaryUser, HttpJsonUser
from loadtest.locust_users import LEVELS
from loadtest.record import ROOT, provenance

SPAWN_RATE = 100.0

__all__ = ["GrpcUser", "HttpBinaryUser", "HttpJsonUser", "Staircase"]


def _options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("lockgate")
    group.add_argument("--model", default="add_sub", help="add_sub, digits, minilm or efficientnet_lite0")
    group.add_argument("--grpc-host", default="127.0.0.1:8001")
    group.add_argument("--repository", default=str(ROOT / "model_repo"), help="for the reference answers")
    group.add_argument("--shape", choices=("closed", "arrival"), default="closed")
    group.add_argument("--levels", default="32", help="users (closed) or requests/s (arrival), comma-separated")
    group.add_argument("--level-seconds", type=float, default=20.0)
    group.add_argument("--max-in-flight", type=int, default=256, help="users that carry arrivals")
    group.add_argument("--result", default="", help="JSON result file")


def _init(**_: Any) -> None:
    grpc_users.prepare()


class Staircase(LoadTestShape):
    """One level after another, each as long: users in a closed loop, or arrivals a second with a fixed crowd of users."""

    def tick(self) -> tuple[int, float] | None:
        """The users wanted now; None ends the run."""
        shape: Any = self
        options = shape.runner.environment.parsed_options
        levels = [float(part) for part in options.levels.split(",")]
        arrival = options.shape == "arrival"
        if arrival and not LEVELS.started:
            # users do nothing before the first level: it starts when the crowd is there
            if shape.get_current_user_count() < options.max_in_flight:
                return options.max_in_flight, SPAWN_RATE
            shape.reset_time()
        index = int(shape.get_run_time() / options.level_seconds)
        if index >= len(levels):
            LEVELS.close()
            return None
        value = levels[index]
        LEVELS.enter(f"{value:g} {'requests/s' if arrival else 'users'}", value, arrival=arrival)
        return (options.max_in_flight if arrival else int(value)), SPAWN_RATE


def _close(**_: Any) -> None:
    LEVELS.close()


def _write(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    levels = [level.report() for level in LEVELS.all]
    document = {
        "kind": "lockgate-locust/1",
        **provenance(),
        "options": {
            "users": options.user_classes or "all",
            "model": options.model,
            "host": environment.host,
            "shape": options.shape,
            "level_seconds": options.level_seconds,
            "max_in_flight": options.max_in_flight if options.shape == "arrival" else None,
        },
        "levels": levels,
    }
    text = json.dumps(document, indent=1, default=str) + "\n"
    if options.result:
        Path(options.result).write_text(text, encoding="utf-8")
    else:
        print(text)


hooks: Any = events  # locust's decorators are not typed
hooks.init_command_line_parser.add_listener(_options)
hooks.init.add_listener(_init)
hooks.test_stop.add_listener(_close)
hooks.quitting.add_listener(_write)
