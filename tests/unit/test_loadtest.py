"""The load tests judge the gateway, so what they judge with is tested first: bodies, parsers, ratios, pacing, soak verdicts."""

from __future__ import annotations

import gzip
import json
import math
import struct

import numpy as np
import pytest

from loadtest import flat, flat_requests, repository_rig, repository_scale, samples
from loadtest.baselines import bare
from loadtest.bench import bodies, generators, instructions, plan, report, runner, statistics
from loadtest.flat_clients import Answers, Tally, judge
from loadtest.pacing import Level, Levels

# printed by wrk 4.1.0 with post.lua and by h2load 1.52.0 on 2026-11-22
WRK = """Running 1s test @ http://127.0.0.1:18000/v2/models/add_sub/infer
  1 threads and 8 connections
  2455 requests in 1.10s, 1.20MB read
Requests/sec:   2228.39
RESULT {"requests":2455,"duration_us":1101693,"p50_us":2905,"p99_us":10615,"max_us":14630,\
"connect":0,"read":0,"write":0,"timeout":0,"status":0}
"""
WRK_REFUSED = """  3308 requests in 1.01s, 730.09KB read
  Non-2xx or 3xx responses: 3308
RESULT {"requests":3308,"duration_us":1005139,"p50_us":2311,"p99_us":7315,"max_us":10836,\
"connect":0,"read":0,"write":0,"timeout":0,"status":3308}
"""
H2LOAD = """finished in 502.38ms, 870.00 req/s, 210.62KB/s
requests: 435 total, 437 started, 435 done, 435 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 435 2xx, 0 3xx, 0 4xx, 0 5xx
time for request:     1.66ms      7.94ms      2.26ms       624us    97.01%
"""
H2LOAD_LOG = """1795312958087689\t200\t2314
1795312958087230\t200\t3665
1795312958090076\t200\t4731
1795312958090917\t200\t5365
1795312958094839\t200\t2535
"""
H2LOAD_DEAD = """finished in 1.01s, 0.00 req/s, 0B/s
requests: 0 total, 0 started, 0 done, 0 succeeded, 0 failed, 0 errored, 0 timeout
"""


@pytest.mark.parametrize("model", ["add_sub", "efficientnet_lite0", "minilm", "digits"])
def test_http_bodies_carry_the_sample(model):
    sample = samples.sample(model)
    for wire in (bodies.http_json(sample), bodies.http_binary(sample)):
        body, length = wire.body, wire.headers.get(bodies.HEADER_LENGTH)
        # a request has the form of a response but for one word
        answer = body.replace(b'"inputs"', b'"outputs"', 1)
        got = bodies.parse_http(answer, None if length is None else str(int(length) + 1))
        assert samples.matches(got, sample.inputs, tolerance=0)
        assert wire.path == f"/v2/models/{model}/infer"


def test_binary_body_is_what_tritonclient_sends():
    http = pytest.importorskip("tritonclient.http")
    sample = samples.add_sub()
    inputs = []
    for name, array in sample.inputs.items():
        entry = http.InferInput(name, list(array.shape), "FP32")
        entry.set_data_from_numpy(array)
        inputs.append(entry)
    body, length = http.InferenceServerClient.generate_request_body(inputs)
    wire = bodies.http_binary(sample)
    assert json.loads(wire.body[: int(wire.headers[bodies.HEADER_LENGTH])]) == json.loads(body[:length])
    assert wire.body[int(wire.headers[bodies.HEADER_LENGTH]) :] == body[length:]


def test_grpc_body_is_a_length_prefixed_request():
    from tritonclient.grpc import service_pb2

    sample = samples.sample("minilm")
    body = bodies.grpc(sample).body
    compressed, length = struct.unpack(">BI", body[:5])
    assert (compressed, length) == (0, len(body) - 5)
    request = service_pb2.ModelInferRequest.FromString(body[5:])
    assert [tuple(tensor.shape) for tensor in request.inputs] == [(1, 32)] * 3
    assert [tensor.datatype for tensor in request.inputs] == ["INT64"] * 3
    assert b"".join(request.raw_input_contents) == bodies.raw_bytes(sample)


def test_grpc_response_is_read():
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse(raw_output_contents=[np.float32([1, 2]).tobytes()])
    response.outputs.add(name="OUT", datatype="FP32", shape=[1, 2])
    assert bodies.parse_grpc(response.SerializeToString())["OUT"].tolist() == [[1, 2]]


def test_raw_body_and_answer():
    sample = samples.add_sub()
    assert bodies.raw(sample).headers["X-Shape"] == "1,16;1,16"
    assert samples.matches(bodies.parse_raw(bodies.raw_bytes(sample), sample.inputs), sample.inputs)
    with pytest.raises(bodies.BodyError):
        bodies.parse_raw(bodies.raw_bytes(sample) + b"x", sample.inputs)


def test_left_over_bytes_are_refused():
    header = b'{"outputs":[{"name":"O","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}]}'
    assert bodies.parse_http(header + bytes(4), str(len(header)))["O"].tolist() == [0]
    with pytest.raises(bodies.BodyError, match="3 bytes left over"):
        bodies.parse_http(header + bytes(7), str(len(header)))


def test_matches_sees_type_shape_and_value():
    want = {"O": np.float32([[1, 2]])}
    assert samples.matches({"O": np.float32([[1, 2.0001]])}, want)
    assert not samples.matches({"O": np.float32([[1, 2.1]])}, want)
    assert not samples.matches({"O": np.float32([1, 2])}, want)
    assert not samples.matches({"O": np.float64([[1, 2]])}, want)
    assert not samples.matches({}, want)


def test_the_highest_version_with_a_file_is_run(tmp_path):
    for version in ("1", "9", "10"):
        (tmp_path / "m" / version).mkdir(parents=True)
    for version in ("1", "9"):
        (tmp_path / "m" / version / "model.onnx").touch()
    assert samples.model_file(tmp_path, "m").parent.name == "9"
    (tmp_path / "m" / "9" / "model.onnx").unlink()
    (tmp_path / "m" / "1" / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError):
        samples.model_file(tmp_path, "m")


def test_wrk_output():
    load = generators.parse_wrk(WRK)
    assert (load.requests, load.seconds, load.errors, load.p50_us, load.p99_us) == (2455, 1.101693, 0, 2905, 10615)
    assert generators.parse_wrk(WRK_REFUSED).errors == 3308
    with pytest.raises(generators.GeneratorError, match="no result"):
        generators.parse_wrk("unable to connect")


def test_h2load_output():
    load = generators.parse_h2load(H2LOAD.replace("502.38ms", "7.70ms"), H2LOAD_LOG)
    assert (load.requests, load.errors, load.p50_us, load.p99_us) == (435, 0, 3665, 5365)
    assert load.seconds == pytest.approx(0.0077)
    with pytest.raises(generators.GeneratorError, match="cannot read"):
        generators.parse_h2load("", "")


def test_perf_output():
    text = "# started on x\n\n2631319661,,instructions:u,3762,100.00,,\n271075834,,instructions:k,3762,100.00,,\n"
    assert instructions.parse(text) == 2902395495
    assert instructions.parse("<not supported>,,instructions:u,0,100.00,,\n") == 0


def test_h2load_silence_is_an_error():
    # h2load says "0 failed, 0 errored" for a server that is not there, and for one that died half-way
    assert generators.parse_h2load(H2LOAD_DEAD, "").errors == 1
    assert generators.parse_h2load(H2LOAD.replace("502.38ms", "5.00s"), H2LOAD_LOG).errors == 1


def test_missing_generator_names_its_package(monkeypatch):
    monkeypatch.setattr(generators.shutil, "which", lambda tool: None if tool == "h2load" else "/usr/bin/x")
    assert generators.missing() == "apt-get update && apt-get install -y nghttp2-client"


def test_percentile_is_nearest_rank():
    assert statistics.percentile(range(1, 101), 99) == 99
    assert statistics.percentile([1.0], 50) == 1.0
    assert math.isnan(statistics.percentile([], 50))


def test_ratio_is_taken_within_pairs():
    # the machine was half as fast in pair 1: the ratio does not see it
    ratio = statistics.paired_ratio({0: 400.0, 1: 200.0, 2: 420.0, 3: 1.0}, {0: 100.0, 1: 50.0, 2: 100.0})
    assert ratio == statistics.Spread(4.0, 4.0, 4.2, 3)
    assert statistics.paired_ratio({0: 1.0}, {1: 1.0}) is None
    assert statistics.paired_ratio({0: 1.0}, {0: 0.0}) is None


def test_plan_interleaves_and_fits(tmp_path):
    options = plan.Options(tmp_path, ("gateway",))
    cells = plan.cells(options)
    assert [cell.system for cell in cells[:10]] == list(plan.ORDER) * 2
    assert [cell.pair for cell in cells[:10]] == [0] * 5 + [1] * 5
    spent = sum(cell.seconds + plan.CELL_OVERHEAD for cell in cells)
    assert spent < 25 * 60
    short = plan.cells(plan.Options(tmp_path, ("gateway",), minutes=12))
    assert len(short) == len(cells)
    assert sum(cell.seconds for cell in short) < spent / 2


def result(system, pair, **changes):
    figures = {"rps": 100.0, "p50_us": 10.0, "p99_us": 20.0, "cpu_us": 50.0} | changes
    return runner.Result(
        changes.pop("model", "add_sub"), changes.pop("connections", 32), pair, system, 5.0, 500, 500,
        **{name: figures[name] for name in ("rps", "p50_us", "p99_us", "cpu_us")},
        errors=changes.get("errors", 0), calibration_ms=20.0, calibration_cpu_ms=20.0,
    )  # fmt: skip


def test_bars_pass_fail_and_absent():
    rows = [result("binary", pair, rps=500.0, cpu_us=90.0) for pair in range(5)]
    rows += [result("fastapi", pair, rps=100.0) for pair in range(5)]
    verdicts = {entry["bar"]["name"]: entry["verdict"] for entry in report.judge(rows)}
    assert verdicts["add_sub HTTP binary, requests/s against (a)"] == "pass"
    assert verdicts["add_sub HTTP binary, CPU us per request"] == "FAIL"
    assert verdicts["add_sub gRPC, CPU us per request"] == "not measured"
    assert verdicts["errors in all runs"] == "pass"
    assert report.judge([result("binary", 0, errors=1)])[-1]["verdict"] == "FAIL"


def test_report_is_saved_and_resumed(tmp_path):
    rows = [result("binary", 0), result("fastapi", 0, rps=50.0)]
    report.save(tmp_path / "out.json", rows, {"commit": "x"})
    assert report.load(tmp_path / "out.json") == rows
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["summary"][0]["vs_a"]["median"] == 2.0
    assert "2.00 (2.00-2.00)" in report.table(rows)
    assert "wanted >= 4" in report.bars(rows)


def test_errors_count_what_the_server_did_not_answer():
    load = generators.Load(requests=100, seconds=1.0, errors=3, p50_us=1, p99_us=1)
    assert runner.errors_of(load, answered=97) == 3
    assert runner.errors_of(load, answered=90) == 10
    assert runner.errors_of(load, answered=110) == 3  # requests in flight when the generator stopped


def test_arrivals_are_due_whatever_the_server_does():
    level = Level("10 requests/s", 10.0, arrival=True, started=100.0)
    assert [level.claim() for _ in range(3)] == pytest.approx([100.0, 100.1, 100.2])
    level.sent, level.ended = 3, 102.05
    level.latencies.extend([0.001, 0.002, 0.003])
    report_ = level.report()
    assert (report_["due"], report_["sent"], report_["unsent"], report_["p50_ms"]) == (21, 3, 18, 2.0)


def test_closed_loop_is_due_at_once():
    levels = Levels()
    levels.enter("4 users", 4, arrival=False)
    levels.enter("4 users", 4, arrival=False)
    assert len(levels.all) == 1
    assert levels.now.claim() is None
    levels.enter("8 users", 8, arrival=False)
    assert levels.all[0].ended
    assert "due" not in levels.all[0].report()


def test_soak_requests_are_what_they_say():
    kinds = flat_requests.bad_http() + flat_requests.broken_http() + flat_requests.bad_grpc()
    assert len({request.kind for request in kinds}) == len(kinds)
    assert not any(request.good for request in kinds)
    for request in flat_requests.good_http():
        head, _, body = request.data.partition(b"\r\n\r\n")
        assert b"Content-Length: %d\r\n" % len(body) in head + b"\r\n"
        if b"gzip" in head:
            assert gzip.decompress(body)


def test_soak_reads_pipelined_answers():
    answers = Answers()
    stream = (
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    found = []
    for byte in stream:
        answers.feed(bytes([byte]))
        while answer := answers.next():
            found.append(answer)
    assert found == [(200, b"ok", False), (400, b"", True)]


def test_soak_judges_answers():
    good = flat_requests.good_http()[0]
    bad = flat_requests.bad_http()[0]
    assert judge(good, 200, b"{}" + good.want) == ""
    assert judge(good, 200, b"{}" + bytes(128)) == "wrong values"
    assert "refused" in judge(good, 500, b"")
    assert judge(bad, 400, b'{"error":"no"}') == ""
    assert "accepted" in judge(bad, 200, b"{}")
    assert "not an error body" in judge(bad, 422, b'{"detail":[]}')


def test_soak_verdicts():
    start = flat.Sample(0, 50 << 20, 20, 10, 1)
    first = flat.Sample(100, 100 << 20, 22, 12, 1)
    tally = Tally(good_right=10)
    same = flat.verdicts([start, first, flat.Sample(1000, 110 << 20, 22, 12, 1)], tally, 10)
    assert all(same.values())
    grown = flat.verdicts([start, first, flat.Sample(1000, 112 << 20, 23, 13, 2)], tally, 9)
    assert not any(verdict for name, verdict in grown.items() if name != "every answer is as it should be")


# --- repository scale


def _sample(**more: int) -> repository_rig.Sample:
    known = {"after": 0, "rss": 400 << 20, "pss": 0, "fds": 9, "threads": 9, "processes": 5, "tasks": 9}
    return repository_rig.Sample(**(known | more))


def test_what_a_model_that_comes_and_goes_leaves_behind_is_found() -> None:
    judged = repository_scale.flat
    assert all(judged([_sample(), _sample(rss=419 << 20, fds=1), _sample(rss=419 << 20)]).values())
    for more in ({"rss": 421 << 20}, {"fds": 10}, {"threads": 10}, {"tasks": 10}, {"processes": 6}):
        verdicts = judged([_sample(), _sample(**more)])
        assert list(verdicts.values()).count(False) == 1, more


def test_what_may_be_refused_of_a_model_that_comes_and_goes() -> None:
    traffic = repository_rig.Traffic(0, ("steady", "reloaded", "flapping"), 1)
    traffic.tallies["flapping"].wrong["Request for unknown model: 'flapping' has no available versions"] += 5
    assert all(repository_scale.kept(traffic).values())
    traffic.tallies["flapping"].wrong["another's answer"] += 1
    assert list(repository_scale.kept(traffic).values()) == [True, False]
    traffic.tallies["reloaded"].wrong["Request for unknown model: 'reloaded' has no available versions"] += 1
    assert list(repository_scale.kept(traffic).values()) == [False, False]


# --- the least server


class Pieces:
    """A socket whose client sends these, and goes."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = [*pieces, b""]

    def recv_into(self, view: memoryview) -> int:
        piece = self._pieces.pop(0)
        view[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("cut", [1, 20, 200, -256, -1])
def test_the_bare_server_finds_the_tensor_however_the_request_is_cut(cut):
    whole = bodies.http_binary(samples.sample("digits"))
    headers = {"Host": "x", **whole.headers, "Content-Length": len(whole.body)}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"POST {whole.path} HTTP/1.1\r\n{lines}\r\n".encode() + whole.body
    (tensor,) = samples.sample("digits").inputs.values()
    client, buffer = Pieces(request[:cut], request[cut:]), bytearray(len(request) + 100)
    start = bare._receive(client, buffer)
    assert buffer[start : start + tensor.nbytes] == tensor.tobytes()
    assert bare._receive(client, buffer) == 0
