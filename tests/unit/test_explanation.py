"""`gateway explain`: its text for people, its options and what it says when there is nothing to show."""

import http.server
import json
import threading
from contextlib import contextmanager
from typing import get_args

import pytest

from gateway import cli, errors
from gateway.scheduling.base import RefusalReason
from gateway.scheduling.policy import Decision
from gateway.transport import explain
from gateway.transport.explanation import CLOSED, REMEDIES, duration, explanation, merged

DEVICE = {
    "batches_seen": 48,
    "per_batch_ms": 0.4,
    "per_row_ms": 0.25,
    "tail_ratio": 1.2,
    "largest_rows_seen": 2,
    "efficient_rows": 16,
    "predictions_trusted": True,
    "predicted_ms_by_rows": {"1": 0.65, "2": 0.9},
}
TOLD = {
    "model": "digits",
    "version": "3",
    "instances": [
        {"device": "cpu", "provider": "CPU", "precision": "INT8", "artefact": "int8", "count": 2},
        {"device": "gpu:0", "provider": "Fake", "precision": "", "artefact": "", "count": 1},
    ],
    "answered": 900,
    "refused": {"shed": 2, "overload": 98},
    "admitted": 1000,
    "late": 5,
    "late_share": 0.005,
    "spilled": 0,
    "batches": 40,
    "failed_batches": 0,
    "mean_rows": 24.5,
    "closed": {"full": 10, "drained": 30},
    "predicted_ms": 1200.0,
    "actual_ms": 1250.0,
    "prediction_error": 0.031,
    "predictions_trusted": True,
    "next": {"deadline_ms": 50.0, "answered_in_ms": 4.2, "refused": None, "text": ""},
    "devices": {"cpu": DEVICE},
}


REPORT = {
    "worker": "worker-0123456789abcdef0123456789abcdef",
    "spilled": 1,
    "failed_batches": 2,
    "predicted_ms": 100.0,
    "actual_ms": 110.0,
    "prediction_error": 0.1,
    "predictions_trusted": True,
    "devices": {"cpu": DEVICE},
    "next": {"deadline_ms": None, "answered_in_ms": 1.0, "refused": None, "text": ""},
}


def of_fleet(*reports):
    """What a gateway that runs nothing itself would be told."""
    own = {key: TOLD[key] for key in TOLD if key not in REPORT or key == "next"}
    return {**own, "workers": reports}


def test_one_process_is_told_as_it_is():
    assert merged(TOLD) is TOLD


def test_what_workers_say_becomes_one():
    other = {**REPORT, "worker": "all-fedcba98", "prediction_error": 0.6, "predictions_trusted": False}
    told = merged(of_fleet(REPORT, other))
    assert (told["spilled"], told["failed_batches"], told["predicted_ms"], told["actual_ms"]) == (2, 4, 200.0, 220.0)
    assert (told["prediction_error"], told["predictions_trusted"]) == (0.6, False)
    assert told["devices"] == {"worker-01234567 cpu": DEVICE, "all-fedcba98 cpu": DEVICE}
    assert told["workers"] == [other["worker"], REPORT["worker"]]
    assert (told["answered"], told["next"]) == (TOLD["answered"], TOLD["next"])
    text = explanation(told).splitlines()
    assert text[2:4] == ["  1 x gpu:0 Fake", "workers that answered: 2"]
    assert "DEVICE worker-01234567 cpu" in text


def test_a_fleet_whose_workers_do_not_answer_is_explained():
    text = explanation(merged(of_fleet()))
    assert "\nworkers that answered: 0\n" in text
    assert "DEVICE" not in text


def test_the_whole_text():
    assert explanation(TOLD).splitlines() == [
        "model digits, version 3",
        "  2 x cpu CPU, int8 (INT8)",
        "  1 x gpu:0 Fake",
        "",
        "THE NEXT REQUEST, of one row, with a deadline in 50.0 ms",
        "  would be accepted, and answered in about 4.20 ms",
        "",
        "REQUESTS since the model was loaded",
        "  answered                         900",
        "  accepted on condition           1000  those with a deadline, a priority or a tenant",
        "  late                               5  0.50% of these were not answered by their deadline",
        "  refused                          100",
        f"    overload                        98  {REMEDIES['overload']}",
        f"    shed                             2  {REMEDIES['shed']}",
        "",
        "BATCHES since the model was loaded",
        "  run                               40  24.5 rows each, on average",
        "  took                          1.25 s  predicted: 1.20 s; with measuring",
        "  predictions are off by          3.1%  lately; they are relied on",
        "  closed: drained                   30   75.0%  nothing else waited",
        "  closed: full                      10   25.0%  the largest batch of the model",
        "",
        "DEVICE cpu",
        "  a batch takes                 400 us  and 250 us for each row",
        "  19 of 20 end within           1.20 x  the predicted time",
        "  efficient from                    16  rows a batch; larger ones gain little",
        "  largest seen                       2  rows, in 48 batches",
        "  predictions                  trusted  they are relied on",
        "    1 row                       650 us",
        "    2 rows                      900 us",
    ]


def test_a_refusal_comes_with_its_text_and_its_remedy():
    told = TOLD | {
        "next": {
            "deadline_ms": None,
            "answered_in_ms": 0.0,
            "refused": "queue_full",
            "text": "Exceeds maximum queue size",
        }
    }
    lines = explanation(told).splitlines()
    assert lines[4:7] == [
        "THE NEXT REQUEST, of one row, with no deadline",
        "  would be refused: Exceeds maximum queue size (queue_full)",
        f"  {REMEDIES['queue_full']}",
    ]


def test_wrong_predictions_spills_and_failures_are_told():
    device = DEVICE | {"predictions_trusted": False}
    told = TOLD | {"predictions_trusted": False, "spilled": 7, "failed_batches": 2, "devices": {"gpu:0": device}}
    text = explanation(told)
    assert text.count("not relied on: first in, first out for now") == 2
    assert "  sent to a slower device            7  " in text
    assert "  failed                             2  " in text


def test_a_device_where_nothing_ran_has_no_figures():
    text = explanation(TOLD | {"devices": {"cpu": DEVICE | {"largest_rows_seen": 0}}})
    assert text.endswith("DEVICE cpu\n  nothing has run here yet, so nothing is known")


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "0 ms"),
        (0.00123, "1.23 us"),
        (0.5, "500 us"),
        (0.9996, "1.00 ms"),
        (12.34, "12.3 ms"),
        (999.6, "1.00 s"),
        (1e7, "10000 s"),
    ],
)
def test_durations_have_their_units(milliseconds, text):
    assert duration(milliseconds) == text


def rows(kind):
    """The reasons of all rows of the error table."""
    return {kind.reason}.union(*map(rows, kind.__subclasses__()))


def test_every_reason_of_a_refusal_has_a_remedy():
    assert set(get_args(RefusalReason)) <= set(REMEDIES)
    assert rows(errors.GatewayError) - {""} == set(REMEDIES)


def test_every_reason_of_a_batch_has_its_words():
    documented = {word for word in Decision.__doc__.split("`")[1::2] if word.isidentifier()} - {"dropped"}
    assert documented | {"retry"} == set(CLOSED)


# --- the command


@contextmanager
def answering(status, body):
    """A server that answers every request with this; gives its URL and the requests it saw."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers["authorization"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


def test_the_command_prints_the_text(capsys):
    with answering(200, json.dumps(TOLD).encode()) as (url, seen):
        assert cli.main(["explain", "digits", "--url", url]) == 0
    assert capsys.readouterr().out == explanation(TOLD) + "\n"
    assert seen == [("/v2/models/digits/explain", None)]


def test_the_command_asks_for_what_it_is_told_and_prints_json(capsys):
    with answering(200, json.dumps(TOLD).encode()) as (url, seen):
        bare = url.removeprefix("http://") + "/"
        assert explain.run(["a/b c", "--version", "3", "--url", bare, "--token", "t" * 16, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == TOLD
    assert seen == [("/v2/models/a%2Fb%20c/versions/3/explain", "Bearer " + "t" * 16)]


@pytest.mark.parametrize("text", ["# ours\n\nacme:secret:1\nother:x\n", "secret\n"])
def test_a_token_comes_from_a_servers_file_or_stands_alone(tmp_path, text):
    file = tmp_path / "tokens"
    file.write_text(text)
    with answering(200, json.dumps(TOLD).encode()) as (url, seen):
        assert explain.run(["digits", "--url", url, "--token-file", str(file)]) == 0
    assert seen[0][1] == ("Bearer secret:1" if "acme" in text else "Bearer secret")


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            404,
            b'{"error":"Request for unknown model: \'digits\' is not found"}',
            "'digits' is not found; `curl -X POST ",
        ),
        (400, b'{"error":"Request for unknown model: \'digits\' has no available versions"}', "no available versions"),
        (401, b'{"error":"this server needs a token"}', "the server wants a token; give --token-file FILE"),
        (404, b'{"error":"Not Found"}', "does not explain itself (status 404); is it a Lockgate"),
        (200, b"<html>", "does not explain itself (status 200)"),
        (503, b'{"error":"Server not ready"}', "gateway explain: Server not ready\n"),
        (200, b'{"model":"digits"}', "is of another version; --json shows what it said"),
    ],
)
def test_what_a_server_refuses_is_said_with_a_remedy(capsys, status, body, message):
    with answering(status, body) as (url, _):
        assert explain.run(["digits", "--url", url]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_a_token_that_is_not_known_is_said_to_be(capsys):
    with answering(401, b"{}") as (url, _):
        assert explain.run(["digits", "--url", url, "--token", "x"]) == 1
    assert "the server knows no such token" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_said_to_be(capsys):
    with answering(200, b"") as (url, _):
        pass
    assert explain.run(["digits", "--url", url]) == 1
    assert f"no gateway answers at {url} (Connection refused); is it running" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://localhost:x"])
def test_a_url_that_is_none_is_refused(capsys, url):
    assert explain.run(["digits", "--url", url]) == 1
    assert f"no gateway answers at {url} (" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("# nothing\n", "has no token; write a line")])
def test_a_token_file_without_a_token_is_refused(capsys, tmp_path, text, message):
    file = tmp_path / "tokens"
    if text is not None:
        file.write_text(text)
    assert explain.run(["digits", "--token-file", str(file)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["m", "--version", "x"], ["m", "--token", "a", "--token-file", "b"]])
def test_wrong_usage_is_status_2(argv):
    with pytest.raises(SystemExit) as caught:
        explain.run(argv)
    assert caught.value.code == 2
