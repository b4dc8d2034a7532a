"""The fleet's client against servers that misbehave: what they do must be in the history, and nothing else."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from loadtest import fleet_client
from loadtest.fleet_client import FleetClient, Plan
from loadtest.history import LOST, UNANSWERED, UNSENT, Run, Writer, check, read
from tests.support import background


def response(tag, status=200, headers=""):
    body = b"{}" + tag if status == 200 else b'{"error":"Server not ready"}'
    return f"HTTP/1.1 {status} Whatever\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Gateway:
    """A server that answers request n, counted over all connections, by `answer(n, tag, transport)`; well, if not told."""

    def __init__(self, answer=None):
        self.heads = []
        self.answer = answer or (lambda number, tag, transport: transport.write(response(tag)))
        self.connections = []

    @asynccontextmanager
    async def listening(self, port=0):
        server = await asyncio.get_running_loop().create_server(lambda: Serving(self), "127.0.0.1", port)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for connection in self.connections:
                connection.abort()


class Serving(asyncio.Protocol):
    """One connection to a `Gateway`."""

    def __init__(self, gateway):
        self.gateway = gateway
        self.part = b""

    def connection_made(self, transport):
        self.transport = transport
        self.gateway.connections.append(transport)

    def data_received(self, data):
        self.part += data
        head, found, body = self.part.partition(b"\r\n\r\n")
        fields = dict(line.split(": ") for line in head.decode().lower().splitlines()[1:])
        if found and len(body) == int(fields["content-length"]):
            self.part = b""
            json.loads(body[:-8])
            self.gateway.heads.append(fields)
            self.gateway.answer(len(self.gateway.heads) - 1, body[-8:], self.transport)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fleet_client, "PATIENCE", 0.05)
    monkeypatch.setattr(fleet_client, "AGAIN", 0.001)


async def carry_out(tmp_path, *ports, **plan):
    made = Plan(
        list(ports), str(tmp_path / "history"), **{"requests": 50, "concurrency": 4, "deadline_ms": 10_000.0, **plan}
    )
    with Writer(tmp_path / "history", Run("a", made.requests, made.deadline_ms)) as writer:
        await FleetClient(made, writer).run()
    return read(tmp_path / "history")


def at(number, otherwise):
    """Does something else at one request."""

    def answer(count, tag, writer):
        if count == number:
            otherwise(tag, writer)
        else:
            writer.write(response(tag))

    return answer


@pytest.mark.parametrize("rate", [0.0, 5000.0])
async def test_a_good_fleet_has_a_good_history(tmp_path, rate):
    gateways = [Gateway(), Gateway()]
    async with gateways[0].listening() as one, gateways[1].listening() as other:
        found = await carry_out(tmp_path, one, other, rate=rate)
    verdict = check([found])
    assert verdict.faults() == []
    assert verdict.accepted == verdict.requests == 50
    assert len({record.tag for record in found.records}) == 50
    assert min(len(gateway.heads) for gateway in gateways) >= 20
    assert 9000 < float(gateways[0].heads[0]["x-request-timeout-ms"]) <= 10_000
    assert "idempotency-key" not in gateways[0].heads[0]


@pytest.mark.parametrize(
    ("otherwise", "file"),
    [
        (lambda tag, writer: writer.write(response(tag) * 2), "twice"),
        (lambda tag, writer: writer.write(response(bytes(8))), "wrong"),
        (lambda tag, writer: writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"), "wrong"),
        (lambda tag, writer: writer.close(), "lost"),
    ],
)
async def test_what_a_gateway_does_is_found(tmp_path, otherwise, file):
    async with Gateway(at(20, otherwise)).listening() as port:
        verdict = check([await carry_out(tmp_path, port)])
    assert len(getattr(verdict, file)) == 1
    assert len(verdict.faults()) == 1


async def test_a_second_answer_that_comes_later_is_told_from_that_to_the_next_request(tmp_path):
    tags = []

    def answer(number, tag, writer):
        tags.append(tag)
        writer.write(response(tags[number - 1 if number == 21 else number]))

    async with Gateway(answer).listening() as port:
        verdict = check([await carry_out(tmp_path, port, concurrency=1)])
    assert (verdict.wrong, verdict.twice) == (["a:21"], ["a:20"])


async def test_an_answer_that_never_comes_is_missing(tmp_path):
    held = []

    async with Gateway(at(20, lambda tag, writer: held.append(tag))).listening() as port:
        found = await carry_out(tmp_path, port, deadline_ms=10.0)
    assert check([found]).missing == [f"a:{record.id}" for record in found.records if record.status == UNANSWERED]
    assert len(held) == 1


async def test_a_refusal_is_filed_with_its_text(tmp_path):
    async with Gateway(at(20, lambda tag, writer: writer.write(response(tag, 503)))).listening() as port:
        found = await carry_out(tmp_path, port)
    (refused,) = [record for record in found.records if record.status != 200]
    assert (refused.status, refused.error, refused.attempts, refused.port) == (503, "Server not ready", 1, port)
    assert check([found]).faults() == []


@pytest.mark.parametrize(
    "otherwise", [lambda tag, writer: writer.close(), lambda tag, writer: writer.write(response(tag, 503))]
)
async def test_what_fails_is_sent_once_more_through_another_gateway(tmp_path, otherwise):
    bad, fine = Gateway(lambda number, tag, writer: otherwise(tag, writer)), Gateway()
    async with bad.listening() as one, fine.listening() as other:
        found = await carry_out(tmp_path, one, other, retries=1, idempotent=True)
    assert check([found]).faults() == []
    assert {record.port for record in found.records} == {other}
    again = [record for record in found.records if record.attempts == 2]
    assert len(again) == len(bad.heads) > 0
    keys = {head["idempotency-key"] for head in bad.heads}
    assert keys == {str(record.tag) for record in again}
    assert keys < {head["idempotency-key"] for head in fine.heads}
    assert all(0 < float(head["x-request-timeout-ms"]) <= 10_000 for head in bad.heads)


async def test_attempts_come_to_an_end(tmp_path):
    async with Gateway(lambda number, tag, writer: writer.close()).listening() as port:
        found = await carry_out(tmp_path, port, retries=2)
    assert {(record.status, record.attempts) for record in found.records} == {(LOST, 3)}


async def test_a_connection_that_will_be_closed_is_not_used_again(tmp_path):
    def answer(number, tag, writer):
        writer.write(response(tag, headers="Connection: close\r\n"))

    async with Gateway(answer).listening() as port:
        found = await carry_out(tmp_path, port)
    assert check([found]).faults() == []


async def test_a_gateway_that_comes_later_is_found(tmp_path):
    gateway = Gateway()
    async with Gateway().listening() as port:
        pass
    async with background(carry_out(tmp_path, port)) as (client,):
        await asyncio.sleep(0)
        async with gateway.listening(port):
            assert check([await client]).faults() == []


async def test_what_finds_no_gateway_is_never_sent(tmp_path):
    async with Gateway().listening() as port:
        pass
    found = await carry_out(tmp_path, port, deadline_ms=10.0, requests=3)
    assert {record.status for record in found.records} == {UNSENT}
    assert len(check([found]).unsent) == 3


async def test_it_stops_when_told_to_and_waits_for_the_last_answers(tmp_path):
    clients = []

    def last(tag, writer):
        clients[0].stop()
        asyncio.get_running_loop().call_soon(writer.write, response(tag))

    async with Gateway(at(20, last)).listening() as port:
        with Writer(tmp_path / "history", Run("a", -1, 1000.0)) as writer:
            clients.append(FleetClient(Plan([port], "", concurrency=4), writer))
            await clients[0].run()
    verdict = check([read(tmp_path / "history")])
    assert verdict.faults() == []
    assert 21 <= verdict.requests <= 24
