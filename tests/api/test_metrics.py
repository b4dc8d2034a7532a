"""`/metrics` as a scraper sees it: Triton's names, types and labels, and our histograms."""

import asyncio
from dataclasses import dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import __version__
from gateway.errors import DeadlineTooShort, InvalidArgument, Shed
from gateway.queues.base import Lane
from gateway.queues.figures import FleetFigures, LaneFigures
from gateway.statistics import Statistics
from gateway.transport.auth import Tokens
from gateway.transport.fleet import FleetMetrics
from gateway.transport.metrics import MetricsApp
from gateway.types import Timings

LABELS = {"model": "digits", "version": "3"}


@dataclass
class Scope:
    """What the app reads of granian's scope."""

    path: str = "/metrics"
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Protocol:
    """Takes the one response that granian's protocol would send."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        assert self.status == 0, "a second response"
        self.status, self.headers, self.body = status, dict(headers), body

    def response_str(self, status: int, headers: list[tuple[str, str]], body: str) -> None:
        self.response_bytes(status, headers, body.encode())


async def get(app: MetricsApp, path: str = "/metrics", method: str = "GET", **headers: str) -> Protocol:
    protocol = Protocol()
    await app.__rsgi__(Scope(path, method, headers), protocol)
    return protocol


@pytest.fixture
def statistics() -> Statistics:
    """One batch of 5 rows of two requests, a failure, a refusal, a bad request, and one more request that is still running."""
    statistics = Statistics(lambda: 1_700_000_000_000)
    counters = statistics.of("digits", "3")
    counters.record_batch(5, 10_000, 200_000, 30_000, "idle")
    counters.record_success(1_000_000, Timings(400_000, 10_000, 200_000, 30_000, 5), 1)
    counters.record_success(1_500_000, Timings(700_000, 10_000, 200_000, 30_000, 5), 4)
    counters.record_failure("REJECTED", 90)
    counters.record_refusal(Shed("for others"), 10)
    counters.record_refusal(InvalidArgument("no such input"), 10)
    counters.pending, counters.executing = 3, 1
    return statistics


async def scrape(statistics: Statistics) -> str:
    return (await get(MetricsApp(statistics.whole))).body.decode()


async def test_the_response_is_prometheus_text(statistics: Statistics) -> None:
    response = await get(MetricsApp(statistics.whole))
    assert response.status == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert len(list(text_string_to_metric_families(response.body.decode()))) > 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nv_inference_request_success", 2),
        ("nv_inference_count", 5),
        ("nv_inference_exec_count", 1),
        ("nv_inference_request_duration_us", 2500),
        ("nv_inference_queue_duration_us", 1100),
        ("nv_inference_compute_input_duration_us", 20),
        ("nv_inference_compute_infer_duration_us", 400),
        ("nv_inference_compute_output_duration_us", 60),
        ("nv_cache_num_hits_per_model", 0),
        ("nv_cache_num_misses_per_model", 0),
        ("nv_cache_hit_duration_per_model", 0),
        ("nv_cache_miss_duration_per_model", 0),
    ],
)
async def test_triton_counters_keep_their_names_and_type(statistics: Statistics, name: str, value: int) -> None:
    text = await scrape(statistics)
    assert f'\n{name}{{model="digits",version="3"}} {value}\n' in "\n" + text
    assert f"# TYPE {name} counter\n" in text


async def test_failures_carry_every_reason(statistics: Statistics) -> None:
    text = await scrape(statistics)
    for reason, count in (("REJECTED", 2), ("CANCELED", 0), ("BACKEND", 0), ("OTHER", 1)):
        assert f'nv_inference_request_failure{{model="digits",version="3",reason="{reason}"}} {count}\n' in text


async def test_pending_leaves_out_what_executes_and_is_never_negative(statistics: Statistics) -> None:
    counters = statistics.of("digits", "3")
    assert 'nv_inference_pending_request_count{model="digits",version="3"} 2\n' in await scrape(statistics)
    counters.pending = 0
    assert 'nv_inference_pending_request_count{model="digits",version="3"} 0\n' in await scrape(statistics)


async def test_histograms_and_reasons(statistics: Statistics) -> None:
    families = {family.name: family for family in text_string_to_metric_families(await scrape(statistics))}

    def value(family: str, suffix: str, **labels: str) -> float:
        wanted = {**LABELS, **labels}
        (found,) = [s.value for s in families[family].samples if s.name == family + suffix and s.labels == wanted]
        return found

    assert value("gateway_queue_seconds", "_bucket", le="0.0005") == 1
    assert value("gateway_queue_seconds", "_bucket", le="0.001") == 2
    assert value("gateway_queue_seconds", "_sum") == pytest.approx(0.0011)
    assert value("gateway_compute_seconds", "_bucket", le="0.00025") == 2
    assert value("gateway_request_seconds", "_bucket", le="0.001") == 1
    assert value("gateway_request_seconds", "_count") == 2
    assert value("gateway_batch_rows", "_bucket", le="4.0") == 0
    assert value("gateway_batch_rows", "_bucket", le="8.0") == 1
    assert value("gateway_batches_closed", "_total", reason="idle") == 1
    assert [(s.labels["reason"], s.value) for s in families["gateway_requests_refused"].samples] == [("shed", 1)]


async def test_the_process_and_the_build_are_described(statistics: Statistics) -> None:
    families = {family.name: family for family in text_string_to_metric_families(await scrape(statistics))}
    assert families["gateway_build_info"].samples[0].labels["version"] == __version__
    assert families["process_resident_memory_bytes"].samples[0].value > 1_000_000


async def test_what_is_counted_by_process_has_no_model(statistics: Statistics) -> None:
    assert "gateway_resubmitted_total" not in await scrape(statistics)  # nothing is, with one process
    statistics.totals.update(resubmitted=3, dead_letters=0)
    text = await scrape(statistics)
    assert "# TYPE gateway_resubmitted_total counter\ngateway_resubmitted_total 3\n" in text
    assert "\ngateway_dead_letters_total 0\n" in text
    assert "\ngateway_statistics_skipped 0\n" in text


async def test_predictions_are_told_where_something_runs(statistics: Statistics) -> None:
    assert "gateway_predictions_trusted{" not in await scrape(statistics)
    statistics.of("digits", "3").predictions = (0.25, False)
    text = await scrape(statistics)
    assert '\ngateway_prediction_error_ratio{model="digits",version="3"} 0.25\n' in text
    assert '\ngateway_predictions_trusted{model="digits",version="3"} 0\n' in text


async def test_the_models_are_of_the_fleet_and_the_process_has_its_name(statistics: Statistics) -> None:
    others = Statistics()
    others.of("digits", "3").record_batch(1, 1, 1, 1, "full")

    async def fleet() -> Statistics:
        return Statistics.merge([statistics.snapshot(), others.snapshot()])

    text = (await get(MetricsApp(fleet, process="gateway-1"))).body.decode()
    assert '\nnv_inference_exec_count{model="digits",version="3"} 2\n' in text
    assert '\nprocess_cpu_seconds_total{process="gateway-1"} ' in text
    assert 'process="gateway-1"' in next(line for line in text.splitlines() if line.startswith("gateway_build_info{"))


async def test_the_queue_between_processes_and_the_workers_it_needs(statistics: Statistics) -> None:
    lanes = {
        Lane("digits", "3"): LaneFigures(lag=60, pending=7, workers=2, rows_per_second=10.0),
        Lane("idle", "1"): LaneFigures(workers=1),
    }
    clock = iter((0.0, 10.0))

    async def figures() -> FleetFigures:
        return FleetFigures(connected=True, lanes=lanes)

    metrics = FleetMetrics(figures, lambda: next(clock))

    async def values() -> dict[tuple[str, str], object]:
        families = await metrics.collect(statistics)
        return {(f.name, labels.get("model", "")): value for f in families for labels, value in f.samples}

    first = await values()
    assert (first["gateway_queue_lag", "digits"], first["gateway_queue_pending", "digits"]) == (60, 7)
    assert (first["gateway_workers", "digits"], first["gateway_workers", "idle"]) == (2, 1)
    assert first["gateway_redis_connected", ""] == 1
    # 60 requests of 2.5 rows in half a minute are 5 rows a second, a worker should do 4; until there is a rate, no
    # worker is given up.
    assert first["gateway_desired_replicas", "digits"] == 2
    counters = statistics.of("digits", "3")
    for _ in range(10):
        counters.record_success(1, Timings(1, 1, 1, 1, 5), 3)
    counters.record_refusal(Shed("for others"), 10)
    counters.record_refusal(DeadlineTooShort("for any number of workers"), 10)
    # 30 rows answered and one refused request of nearly 3 rows, in 10 s, make 3.29 rows a second more.
    second = await values()
    assert second["gateway_desired_replicas", "digits"] == pytest.approx((3.29 + 60 * 35 / 12 / 30) / 4, abs=0.02)
    assert second["gateway_desired_replicas", "idle"] == 1


async def test_a_gateway_without_redis_says_so(statistics: Statistics) -> None:
    async def figures() -> FleetFigures:
        return FleetFigures(connected=False)

    text = (await get(MetricsApp(statistics.whole, figures=figures))).body.decode()
    assert "\ngateway_redis_connected 0\n" in text
    assert "gateway_desired_replicas{" not in text
    assert "gateway_redis_connected" not in await scrape(statistics)


async def test_a_scrape_sees_what_was_counted_since_the_last(statistics: Statistics) -> None:
    app = MetricsApp(statistics.whole)
    await get(app)
    statistics.of("digits", "3").record_success(1_000, None, 1)
    text = (await get(app)).body.decode()
    assert 'nv_inference_request_success{model="digits",version="3"} 3\n' in text


async def test_no_models_is_a_valid_answer() -> None:
    response = await get(MetricsApp(Statistics().whole))
    assert response.status == 200
    assert b"# TYPE nv_inference_count counter" in response.body


@pytest.mark.parametrize(
    ("path", "method", "status", "body"),
    [
        ("/", "GET", 404, b'{"error":"Not Found"}'),
        ("/metrics/", "GET", 404, b'{"error":"Not Found"}'),
        ("/metrics", "POST", 405, b'{"error":"Method Not Allowed"}'),
    ],
)
async def test_anything_else_is_refused(path: str, method: str, status: int, body: bytes) -> None:
    response = await get(MetricsApp(Statistics().whole), path, method)
    assert (response.status, response.body) == (status, body)


async def test_where_callers_need_a_token_scrapers_need_one_too() -> None:
    app = MetricsApp(Statistics().whole, Tokens({"t" * 16: "ops"}))
    assert (await get(app)).status == 401
    assert (await get(app, authorization="Bearer " + "x" * 16)).status == 401
    assert (await get(app, authorization="Bearer " + "t" * 16)).status == 200


async def test_probes_learn_of_health_without_a_token() -> None:
    def health(word: str) -> tuple[int, list[tuple[str, str]], bytes]:
        return (200 if word == "live" else 400), [], word.encode()

    app = MetricsApp(Statistics().whole, Tokens({"t" * 16: "ops"}), health=health)
    for word, status in (("live", 200), ("ready", 400)):
        response = await get(app, f"/v2/health/{word}")
        assert (response.status, response.body) == (status, word.encode())
    assert (await get(app, "/v2/health/other")).status == 401
    assert (await get(app, "/v2/health/live", "POST")).status == 401


async def test_tasks_of_the_event_loop_are_counted(statistics: Statistics) -> None:
    async def told() -> int:
        text = await scrape(statistics)
        return int(next(line for line in text.splitlines() if line.startswith("gateway_tasks ")).split()[1])

    before, forever = await told(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(forever.wait())
        assert await told() == before + 3
        forever.set()
