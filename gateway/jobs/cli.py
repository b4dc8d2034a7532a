"""The command `gateway jobs`: the operator's view of async jobs, of all tenants, straight from the queue's Redis."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

from gateway.errors import GatewayError
from gateway.jobs.record import STATES, Job, is_id, unknown
from gateway.jobs.store import JobStore
from gateway.jobs.view import view
from gateway.jobs.webhook import WebhookKey
from gateway.redis_client import RedisClient, RedisOptions

_ALL = 1_000_000  # more jobs than any --max-jobs


def run(argv: Sequence[str]) -> int:
    """Carry out the command and return the exit status; prints a problem, and raises `SystemExit` 2 on a bad option."""
    options = _parser().parse_args(argv)
    try:
        lines = options.action(options)
    except (GatewayError, OSError, ValueError) as problem:
        sys.stderr.write(f"gateway jobs: {problem}\n")
        return 1
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway jobs",
        description="List, show, cancel and queue again the async jobs of a fleet; see the README on async inference.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, text: str, work: Callable[[JobStore, argparse.Namespace], Coroutine[Any, Any, Iterable[str]]]
    ) -> Any:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        _add_connection(command)
        command.set_defaults(action=lambda options: asyncio.run(_connected(options, work)))
        return command

    listing = add("list", "list jobs, the newest first", _list)
    listing.add_argument("--state", choices=STATES, help="only those in this state; 'dead' are the dead letters")
    listing.add_argument("--limit", type=int, default=100, metavar="N", help="at most so many (default: 100)")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    add("show", "show one job, without its inputs and outputs", _show).add_argument("id", metavar="ID")
    again = add("requeue", "run jobs again that are dead or failed", _requeue)
    which = again.add_mutually_exclusive_group(required=True)
    which.add_argument("id", metavar="ID", nargs="?")
    which.add_argument("--all", action="store_true", help="every dead letter")
    add("cancel", "cancel a job", _cancel).add_argument("id", metavar="ID")
    key = commands.add_parser("webhook-key", help="print the key that receivers of webhooks check signatures with")
    key.add_argument("--queue-key-file", type=Path, required=True, metavar="FILE", help="as given to gateway serve")
    key.set_defaults(action=lambda options: [webhook_key(options.queue_key_file).text])
    return parser


def _add_connection(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("where the jobs are, as given to gateway serve").add_argument
    add(
        "--queue",
        required=True,
        metavar="URL",
        help="redis://, rediss://, unix://, redis+sentinel://, redis+cluster://",
    )
    add("--queue-prefix", default="lockgate", metavar="TEXT", help="what the keys begin with (default: lockgate)")
    add("--queue-username", default="", metavar="TEXT", help="ACL user")
    add("--queue-password-file", type=Path, metavar="FILE", help="file with the password")
    add("--queue-ca-file", type=Path, metavar="FILE", help="PEM file of the authority of the server's certificate")


def webhook_key(file: Path) -> WebhookKey:
    """The key of webhooks for a deployment key in a file. Raises OSError."""
    return WebhookKey(file.read_bytes().strip())


async def _connected(
    options: argparse.Namespace, work: Callable[[JobStore, argparse.Namespace], Coroutine[Any, Any, Iterable[str]]]
) -> Iterable[str]:
    redis = RedisOptions(
        options.queue,
        prefix=options.queue_prefix,
        username=options.queue_username,
        password_file=options.queue_password_file,
        ca_file=options.queue_ca_file,
    )
    async with RedisClient(redis) as client:
        store = JobStore(client)
        try:
            return await work(store, options)
        finally:
            store.close()


async def _list(store: JobStore, options: argparse.Namespace) -> Iterable[str]:
    jobs = await store.newest([options.state] if options.state else STATES, options.limit)
    if options.json:
        return [json.dumps(_told(job)) for job in jobs]
    rows = [("ID", "STATE", "MODEL", "TENANT", "ATTEMPTS", "CREATED", "ERROR"), *map(_row, jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return ["  ".join([*map(str.ljust, row[:6], widths), row[6]]).rstrip() for row in rows]


async def _show(store: JobStore, options: argparse.Namespace) -> Iterable[str]:
    job = (await store.get(_id(options))).job
    return json.dumps(_told(job), indent=2).splitlines()


async def _requeue(store: JobStore, options: argparse.Namespace) -> Iterable[str]:
    names = [job.id for job in await store.newest(["dead"], _ALL)] if options.all else [_id(options)]
    for name in names:
        await store.requeue(name)
    return [f"{name} queued" for name in names] or ["there are no dead letters"]


async def _cancel(store: JobStore, options: argparse.Namespace) -> Iterable[str]:
    job = await store.cancel(_id(options))
    return [f"{job.id} {job.state}"]


def _id(options: argparse.Namespace) -> str:
    if not is_id(options.id):
        raise unknown(options.id)
    return str(options.id)


def _told(job: Job) -> dict[str, Any]:
    return {**view(job), "tenant": job.tenant, "crashes": job.crashes, "bytes": job.size}


def _row(job: Job) -> tuple[str, ...]:
    told = view(job)
    model = f"{job.model}/{job.version}" if job.version else job.model
    error = str(told.get("error", "")).partition("\n")[0]
    return job.id, job.state, model, job.tenant or "-", str(job.attempts), told["created_at"], error
