"""Log lines a person and a machine can read, and metrics Prometheus can."""

import json
import logging
import re
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry import (
    Buckets,
    Family,
    LogFormat,
    Refusals,
    configure_logging,
    log_event,
    process_metrics,
    write_metrics,
)

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Callable[[], list[str]]]]:
    """Configure logging as the process does, put everything back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("gateway")
    saved = root.handlers, root.level, ours.level
    root.handlers = []

    def configure(log_format: LogFormat, verbose: int = 0, process: str = "") -> Callable[[], list[str]]:
        configure_logging(log_format, verbose, process)
        return lambda: capsys.readouterr().err.splitlines()  # noqa: PLW0108 - read when called, not now

    yield configure
    root.handlers = saved[0]
    root.setLevel(saved[1])
    ours.setLevel(saved[2])


def fail() -> ValueError:
    with pytest.raises(ValueError, match="forged") as raised:
        forge("no\n2026-01-01T00:00:00.000Z INFO forged")
    return raised.value


def forge(text: str) -> int:
    raise ValueError(text)


def test_text_line(lines) -> None:
    read = lines("text")
    log_event("model_loaded", model="digits", version=1, seconds=0.25, cold=True, reason=None)
    (line,) = read()
    time, rest = line.split(" ", 1)
    assert TIME.fullmatch(time)
    assert rest == "INFO model_loaded model=digits version=1 seconds=0.25 cold=true reason=null"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_each_line_names_its_process(lines, log_format) -> None:
    read = lines(log_format, process="worker-1")
    log_event("model_loaded", source="forged")
    (line,) = read()
    if log_format == "json":
        assert json.loads(line)["source"] == "worker-1"
    else:
        assert line.split(" ", 1)[1] == "INFO [worker-1] model_loaded source=forged"


def test_text_quotes_what_could_be_misread(lines) -> None:
    read = lines("text")
    log_event("refused", a="two words", b='"', c="x=y", d="", e="line\nbreak\x1b[0m", f="modèle")
    (line,) = read()
    assert line.endswith(r'a="two words" b="\"" c="x=y" d="" e="line\nbreak\u001b[0m" f=modèle')


def test_json_line(lines) -> None:
    read = lines("json")
    log_event("model_loaded", model="digits", note="a\nb", seconds=float("inf"))
    (line,) = read()
    event = json.loads(line)
    assert TIME.fullmatch(event.pop("time"))
    assert event == {"level": "INFO", "event": "model_loaded", "model": "digits", "note": "a\nb", "seconds": "inf"}


def test_a_field_cannot_replace_the_head_of_a_json_line(lines) -> None:
    read = lines("json")
    log_event("infer", event="forged", level="DEBUG", model="m")
    event = json.loads(read()[0])
    assert (event["event"], event["level"], event["model"]) == ("infer", "INFO", "m")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_long_field_is_cut_and_says_so(lines, log_format: LogFormat) -> None:
    read = lines(log_format)
    log_event("refused", id="x" * 1_000_000)
    (line,) = read()
    assert "... (1000000 characters)" in line
    assert len(line) < 2_200


def test_a_traceback_is_one_json_line(lines) -> None:
    read = lines("json")
    log_event("batch_failed", logging.ERROR, fail(), model="m")
    (line,) = read()
    assert "ValueError: no" in json.loads(line)["trace"]


def test_a_traceback_in_text_cannot_forge_a_line(lines) -> None:
    read = lines("text")
    log_event("batch_failed", logging.ERROR, fail(), model="m")
    first, *trace = read()
    assert first.endswith("ERROR batch_failed model=m")
    assert all(line.startswith("    ") for line in trace)
    assert any("forged" in line for line in trace)


def test_debug_needs_verbose(lines) -> None:
    read = lines("text", 0)
    log_event("detail", logging.DEBUG)
    assert read() == []
    read = lines("text", 1)
    log_event("detail", logging.DEBUG)
    assert [line.split(" ", 1)[1] for line in read()] == ["DEBUG detail"]


def test_levels_may_be_off_from_the_start(lines) -> None:
    read = lines("text")
    configure_logging("text", 1, "", ["info", "error"])
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        log_event("said", level)
    assert [line.split()[1] for line in read()] == ["DEBUG", "WARNING"]
    configure_logging("text", 0)
    log_event("said")
    assert len(read()) == 1


def test_other_libraries_speak_the_same_format(lines) -> None:
    read = lines("json")
    logging.getLogger("somelib.part").info("too quiet")
    logging.getLogger("somelib.part").warning("%d left", 3)
    (line,) = read()
    event = json.loads(line)
    assert (event["event"], event["logger"], event["message"]) == ("log", "somelib.part", "3 left")


def test_refusals_are_logged_at_powers_of_ten_for_each_class(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    for turn in range(1, 121):
        refusals.note("DeadlineExceeded", model="m", turn=turn)
    refusals.note("NotFound", model="n")
    logged = [(record.msg.fields["kind"], record.msg.fields["count"]) for record in caplog.records]
    assert logged == [("DeadlineExceeded", 1), ("DeadlineExceeded", 10), ("DeadlineExceeded", 100), ("NotFound", 1)]
    assert caplog.records[2].msg.fields["turn"] == 100
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_refusals_that_are_noted_together_are_logged_when_they_pass_a_power_of_ten(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusals = Refusals()
    for times in (7, 2, 3, 80, 4, 2000):
        refusals.note("Overloaded", times)
    assert [record.msg.fields["count"] for record in caplog.records] == [7, 12, 2096]


def test_metrics_text_is_exact() -> None:
    labels = {"model": 'a"b\\c\nd', "version": "1"}
    families = [
        Family("nv_inference_count", "counter", "Rows", [(labels, 7)]),
        Family("up", "gauge", "Always", [({}, 0.5)]),
        Family("wait_seconds", "histogram", "Wait", [({"m": "x"}, Buckets((0.1, 1.0), (2, 0, 3), 9.5))]),
        Family("bare", "histogram", "No labels", [({}, Buckets((1.0,), (1, 0), 1))]),
    ]
    assert write_metrics(families).decode() == (
        "# HELP nv_inference_count Rows\n"
        "# TYPE nv_inference_count counter\n"
        'nv_inference_count{model="a\\"b\\\\c\\nd",version="1"} 7\n'
        "# HELP up Always\n"
        "# TYPE up gauge\n"
        "up 0.5\n"
        "# HELP wait_seconds Wait\n"
        "# TYPE wait_seconds histogram\n"
        'wait_seconds_bucket{m="x",le="0.1"} 2\n'
        'wait_seconds_bucket{m="x",le="1.0"} 2\n'
        'wait_seconds_bucket{m="x",le="+Inf"} 5\n'
        'wait_seconds_sum{m="x"} 9.5\n'
        'wait_seconds_count{m="x"} 5\n'
        "# HELP bare No labels\n"
        "# TYPE bare histogram\n"
        'bare_bucket{le="1.0"} 1\n'
        'bare_bucket{le="+Inf"} 1\n'
        "bare_sum 1\n"
        "bare_count 1\n"
    )


def test_a_label_survives_prometheus_own_parser() -> None:
    awkward = 'a"b\\c\nd,e}f é'
    text = write_metrics([Family("x", "gauge", "help", [({"model": awkward}, 1)])]).decode()
    (family,) = text_string_to_metric_families(text)
    assert family.samples[0].labels == {"model": awkward}


def test_process_metrics_keep_their_standard_names() -> None:
    names = {family.name: family.kind for family in process_metrics({})}
    assert names["process_cpu_seconds_total"] == "counter"
    assert names["process_resident_memory_bytes"] == "gauge"
    assert names["process_open_fds"] == "gauge"
