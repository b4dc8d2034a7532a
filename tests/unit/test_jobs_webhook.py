"""Webhooks: only allowed hosts and addresses are called, bodies are signed, failures tried again a few times."""

import asyncio
import hashlib
import hmac
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest

from gateway import errors
from gateway.jobs import hooks
from gateway.jobs.hooks import HookRunner
from gateway.jobs.view import view
from gateway.jobs.webhook import Caller, WebhookKey, WebhookPolicy
from gateway.redis_client import RedisOptions
from gateway.transport.http import Counted, HttpServer, TlsFiles
from tests.api.test_http_server import certificate  # noqa: F401 - a fixture
from tests.jobs_support import Gateway, gateway
from tests.redis_support import options
from tests.support import refusal

KEY = WebhookKey(b"k" * 32)


# --- what may be called


@pytest.mark.parametrize(
    ("allowed", "url", "good"),
    [
        ("a.example", "https://a.example/x?y=1", True),
        ("a.example", "https://A.EXAMPLE./", True),
        ("a.example", "https://a.example:443/", True),
        ("a.example", "http://a.example/", False),
        ("a.example", "https://a.example:444/", False),
        ("a.example", "https://b.a.example/", False),
        ("a.example", "https://a.example.evil.example/", False),
        ("a.example", "https://a.example@evil.example/", False),
        ("a.example", "https://user@a.example/", False),
        ("a.example", "https://a.example\\@evil.example/", False),
        ("a.example", "https://a.example/#x", False),
        ("a.example", "ftp://a.example/", False),
        ("a.example", "//a.example/", False),
        ("a.example", "https:///x", False),
        ("a.example", "https://a.example:x/", False),
        ("a.example", "https://a.example/\r\nX: y", False),
        ("a.example", "https://a.éxample/", False),
        ("a.example", "https://a.example/" + "x" * 2048, False),
        ("a.example:8443", "https://a.example:8443/", True),
        ("http://a.example:80", "http://a.example/", True),
        ("http://a.example", "https://a.example/", False),
        ("http://[::1]:99", "http://[::1]:99/", True),
        ("10.0.0.0/8", "https://10.1.2.3/", False),  # an address is no host
    ],
)
def test_which_urls_may_be_called(allowed: str, url: str, good: bool) -> None:
    policy = WebhookPolicy([allowed])
    if good:
        policy.check(url)
    else:
        with pytest.raises(errors.InvalidArgument):
            policy.check(url)


def test_without_any_host_nothing_may_be_called() -> None:
    with pytest.raises(errors.InvalidArgument, match="--webhook-allow HOST"):
        WebhookPolicy(()).check("https://a.example/")


@pytest.mark.parametrize("entry", ["http://", "https://a/path", "https://u@a/", "10.0.0.1/8", "a:b", "ftp://a"])
def test_an_entry_that_says_nothing_is_refused(entry: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="--webhook-allow"):
        WebhookPolicy([entry])


@pytest.mark.parametrize(
    ("host", "address", "good"),
    [
        ("a.example", "93.184.216.34", True),
        ("a.example", "2606:2800:220:1::1", True),
        ("a.example", "127.0.0.1", False),
        ("a.example", "::1", False),
        ("a.example", "::ffff:127.0.0.1", False),
        ("a.example", "169.254.169.254", False),
        ("a.example", "fe80::1%eth0", False),
        ("a.example", "192.168.1.1", False),
        ("a.example", "10.1.2.3", True),  # the network is allowed
        ("a.example", "::ffff:10.1.2.3", True),
        ("a.example", "224.0.0.1", False),
        ("a.example", "0.0.0.0", False),
        ("127.0.0.1", "127.0.0.1", True),  # the operator gave the address itself
        ("localhost", "127.0.0.1", True),
        ("localhost", "10.9.9.9", True),
        ("localhost", "93.184.216.34", False),
    ],
)
def test_which_addresses_a_host_may_have(host: str, address: str, good: bool) -> None:
    assert WebhookPolicy(["10.0.0.0/8"]).allows_address(host, address) is good


# --- one call


@dataclass
class Receiver:
    """An HTTP server that answers what it is told to, in turn, and the last of it for good."""

    statuses: list[int]
    url: str = ""
    received: "asyncio.Queue[tuple[str, dict[str, str], bytes]]" = field(default_factory=asyncio.Queue)

    async def answer(self, scope: Any, protocol: Any) -> None:
        body = await protocol()
        self.received.put_nowait((scope.path, dict(scope.headers.items()), body))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        headers = [("location", self.url + "/elsewhere")] if 300 <= status < 400 else []
        protocol.response_bytes(status, headers, b"x" * 100_000)


@asynccontextmanager
async def receiving(*statuses: int, tls: TlsFiles | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver(list(statuses))
    async with HttpServer(Counted(receiver.answer), "127.0.0.1", 0, tls=tls) as server:
        scheme = "https" if tls else "http"
        receiver.url = f"{scheme}://{'localhost' if tls else '127.0.0.1'}:{server.port}"
        yield receiver


async def test_a_body_is_signed_so_that_a_receiver_can_check_it() -> None:
    async with receiving(204) as receiver, Caller(WebhookPolicy([receiver.url]), KEY) as caller:
        outcome = await caller.call(receiver.url + "/hook?a=b", b'{"id":1}', 1_700_000_000)
        assert outcome.delivered
        path, headers, body = await receiver.received.get()
        assert (path, body, headers["content-type"]) == ("/hook", b'{"id":1}', "application/json")
        assert headers["host"] == receiver.url.removeprefix("http://")
        # As the README tells receivers to.
        signed = headers["lockgate-timestamp"].encode() + b"." + body
        expected = hmac.new(KEY.text.encode(), signed, hashlib.sha256).hexdigest()
        assert headers["lockgate-signature"] == f"v1={expected}"
        assert headers["lockgate-timestamp"] == "1700000000"


def test_the_key_of_webhooks_is_not_the_deployment_s() -> None:
    assert b"k" * 32 not in KEY.text.encode()
    assert KEY.text != (b"k" * 32).hex()
    assert WebhookKey(b"l" * 32).text != KEY.text


@pytest.mark.parametrize(
    ("status", "again"), [(301, False), (307, False), (400, False), (404, False), (408, True), (429, True), (503, True)]
)
async def test_what_counts_as_delivered_and_what_is_tried_again(status: int, again: bool) -> None:
    async with receiving(status, 200) as receiver, Caller(WebhookPolicy([receiver.url]), KEY) as caller:
        outcome = await caller.call(receiver.url, b"{}", 0)
        assert (outcome.delivered, outcome.again) == (False, again)
        assert receiver.received.qsize() == 1  # a redirect is not followed


async def test_a_host_that_is_not_allowed_is_not_called() -> None:
    async with receiving(200) as receiver, Caller(WebhookPolicy(["a.example"]), KEY) as caller:
        outcome = await caller.call(receiver.url, b"{}", 0)
        assert (outcome.delivered, outcome.again) == (False, False)
        assert receiver.received.empty()


async def test_a_name_is_resolved_once_and_its_address_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that an attacker points to this machine."""
    async with receiving(200) as receiver:
        port = int(receiver.url.rpartition(":")[2])
        asked = []

        async def resolve(host: str, *_: Any, **__: Any) -> Any:
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        url = f"http://rebound.example:{port}/"
        async with Caller(WebhookPolicy([url]), KEY) as caller:
            outcome = await caller.call(url, b"{}", 0)
            assert not outcome.delivered
            assert "no address that may be called" in outcome.reason
            assert receiver.received.empty()
        async with Caller(WebhookPolicy([url, "127.0.0.0/8"]), KEY) as caller:
            asked.clear()
            assert (await caller.call(url, b"{}", 0)).delivered
            assert asked[0] == "rebound.example"
            assert "rebound.example" not in asked[1:]  # the connection is to the address that was checked
            assert (await receiver.received.get())[1]["host"] == f"rebound.example:{port}"


async def test_nobody_there_is_tried_again() -> None:
    async with receiving(200) as receiver:
        url = receiver.url
    async with Caller(WebhookPolicy([url]), KEY) as caller:
        outcome = await caller.call(url, b"{}", 0)
        assert (outcome.delivered, outcome.again) == (False, True)
        assert "ConnectError" in outcome.reason


async def test_tls_is_checked_for_the_name_not_the_address(
    certificate: TlsFiles,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with receiving(200, tls=certificate) as receiver:
        policy = WebhookPolicy([receiver.url, receiver.url.replace("localhost", "127.0.0.1")])
        async with Caller(policy, KEY) as caller:
            assert "ConnectError" in (await caller.call(receiver.url, b"{}", 0)).reason  # nobody vouches for it
        trusting = ssl.create_default_context(cafile=str(certificate.cert))
        monkeypatch.setattr("gateway.jobs.webhook._trusted", lambda: trusting)
        async with Caller(policy, KEY) as caller:
            assert (await caller.call(receiver.url, b"{}", 0)).delivered
            other = receiver.url.replace("localhost", "127.0.0.1")  # the certificate is localhost's
            assert not (await caller.call(other, b"{}", 0)).delivered


async def test_a_receiver_that_never_answers_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.jobs.webhook._TOTAL", 0.05)

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Caller(WebhookPolicy([url]), KEY) as caller:
            outcome = await caller.call(url, b"{}", 0)
            assert (outcome.delivered, outcome.again) == (False, True)
        gone.set()


# --- delivery


@asynccontextmanager
async def delivering(one: Gateway, url: str, first_delay: float = 0.01) -> AsyncIterator[HookRunner]:
    caller = Caller(WebhookPolicy([url]), KEY)
    body = lambda job: orjson.dumps(view(job))  # noqa: E731
    async with HookRunner(one.jobs.store, one.jobs.feed, caller, body, first_delay) as runner:
        yield runner


async def settled(one: Gateway, job: Any) -> Any:
    """The job once its webhook is no longer to be delivered."""
    return await one.until(job, lambda found: found.hook not in ("", "pending"))


async def test_the_end_of_a_job_is_told_once_and_noted(redis_url: str) -> None:
    async with receiving(200) as receiver, gateway(options(redis_url), allow=(receiver.url,)) as one:
        async with delivering(one, receiver.url):
            job = await one.submit(callback=receiver.url + "/done")
            path, _, body = await receiver.received.get()
            told = json.loads(body)
            assert (path, told["id"], told["state"], told["model_name"]) == ("/done", job.id, "done", "m")
            assert "result" not in told
            found = await settled(one, job)
            assert (found.hook, found.hook_attempts) == ("delivered", 1)
        assert await one.client.call("ZCARD", one.client.keys.job_hooks()) == 0
        assert receiver.received.empty()


@pytest.mark.parametrize("end", ["cancelled", "failed"])
async def test_every_end_is_told(redis_url: str, end: str) -> None:
    async with (
        receiving(200) as receiver,
        gateway(options(redis_url), allow=(receiver.url,)) as one,
        delivering(one, receiver.url),
    ):
        one.model.problems = [errors.InvalidArgument("no")]
        if end == "cancelled":
            one.model.free.clear()
        job = await one.submit(callback=receiver.url)
        if end == "cancelled":
            await one.jobs.cancel(job.id, "")
        told = json.loads((await receiver.received.get())[2])
        assert told["state"] == end
        assert told.get("error") == ("no" if end == "failed" else None)


async def test_failures_are_tried_again_with_growing_delays(redis_url: str) -> None:
    async with (
        receiving(500, 503, 200) as receiver,
        gateway(options(redis_url), allow=(receiver.url,)) as one,
        delivering(one, receiver.url) as runner,
    ):
        job = await one.submit(callback=receiver.url)
        found = await settled(one, job)
        assert (found.hook, found.hook_attempts) == ("delivered", 3)
        assert receiver.received.qsize() == 3
        delays = [runner._delay(attempt) for attempt in range(1, 30)]
        assert all(0.005 * 2**n <= delay <= 0.01 * 2**n for n, delay in enumerate(delays[:8]))
        assert max(delays) <= hooks._LAST


async def test_attempts_are_bounded(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "ATTEMPTS", 3)
    async with (
        receiving(500) as receiver,
        gateway(options(redis_url), allow=(receiver.url,)) as one,
        delivering(one, receiver.url),
    ):
        found = await settled(one, await one.submit(callback=receiver.url))
        assert (found.hook, found.hook_attempts) == ("given up: status 500", 3)
        assert await one.client.call("ZCARD", one.client.keys.job_hooks()) == 0


async def test_a_redirect_ends_it(redis_url: str) -> None:
    async with (
        receiving(302) as receiver,
        gateway(options(redis_url), allow=(receiver.url,)) as one,
        delivering(one, receiver.url),
    ):
        found = await settled(one, await one.submit(callback=receiver.url))
        assert found.hook == "given up: status 302, and redirects are not followed"
        assert receiver.received.qsize() == 1


async def test_another_gateway_delivers_what_was_left(redis_url: str) -> None:
    of: RedisOptions = options(redis_url)
    async with receiving(200) as receiver:
        async with gateway(of, allow=(receiver.url,)) as one:
            job = await one.ended(await one.submit(callback=receiver.url))
            assert job.hook == "pending"
        async with gateway(of, runs=False) as other, delivering(other, receiver.url):
            assert (await settled(other, job)).hook == "delivered"


async def test_two_gateways_deliver_once(redis_url: str) -> None:
    of = options(redis_url)
    async with (
        receiving(200) as receiver,
        gateway(of, allow=(receiver.url,)) as one,
        gateway(of, runs=False) as other,
        delivering(one, receiver.url),
        delivering(other, receiver.url),
    ):
        jobs = [await one.submit(callback=receiver.url) for _ in range(20)]
        for job in jobs:
            await settled(one, job)
        told = [json.loads(receiver.received.get_nowait()[2])["id"] for _ in range(receiver.received.qsize())]
        assert sorted(told) == sorted(job.id for job in jobs)


async def test_a_callback_that_is_not_allowed_is_no_job(redis_url: str) -> None:
    async with gateway(options(redis_url), runs=False, allow=("a.example",)) as one:
        assert isinstance(await refusal(one.submit(callback="https://b.example/")), errors.InvalidArgument)
        assert await one.jobs.list("", ["queued"], 1) == []
