"""Metrics that models' code keeps: what NVIDIA's own test of them asks, who shares one, and how long they are there."""

from dataclasses import replace

import pytest

from gateway.engines.measures import Measure, Measures, Owner
from gateway.engines.python.errors import TritonModelException
from gateway.engines.python.observing import MetricFamily, MetricKind
from gateway.errors import InvalidArgument, ResourceExhausted, Unavailable
from gateway.queues.base import PoolState, VersionState
from gateway.service import measures as module
from gateway.service.measures import FleetMeasures
from gateway.telemetry import write_metrics
from tests.support import model_config

COUNTER, GAUGE, HISTOGRAM = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM


def pools(backend: str = "python") -> list[PoolState]:
    return [PoolState("m", (VersionState("1", "READY", config=replace(model_config(), backend=backend)),))]


def instance(measures: Measures) -> type[MetricFamily]:
    """`pb_utils.MetricFamily` of an instance of its own."""
    owner = Owner(measures)

    def measure(asked: Measure, *, wait: bool = True) -> float:
        return owner.act(asked)

    return type("MetricFamily", (MetricFamily,), {"measure": staticmethod(measure)})


def shown(measures: Measures) -> str:
    return write_metrics(measures.families()).decode()


@pytest.fixture
def measures() -> Measures:
    return Measures()


@pytest.fixture
def family(measures: Measures) -> type[MetricFamily]:
    return instance(measures)


def test_a_counter_only_grows(measures: Measures, family: type[MetricFamily]) -> None:
    runs = family(name="runs", description="how often", kind=family.COUNTER)
    metric = runs.Metric(labels={"b": "2", "a": "1"})
    assert metric.value() == 0.0
    metric.increment(2023)
    metric.increment(0.5)
    assert metric.value() == 2023.5
    with pytest.raises(TritonModelException, match="can only be incremented monotonically by non-negative values"):
        metric.increment(-1)
    for call, name in ((metric.set, "Set"), (metric.observe, "Observe")):
        with pytest.raises(TritonModelException, match=f"TRITONSERVER_METRIC_KIND_COUNTER does not support {name}"):
            call(1)
    assert shown(measures) == '# HELP runs how often\n# TYPE runs counter\nruns{a="1",b="2"} 2023.5\n'


def test_a_gauge_goes_up_and_down(measures: Measures, family: type[MetricFamily]) -> None:
    level = family("level", "how high", GAUGE)
    metric = level.Metric()
    metric.increment(5)
    metric.increment(-7.5)
    assert metric.value() == -2.5
    metric.set(10)
    assert shown(measures).splitlines()[1:] == ["# TYPE level gauge", "level 10"]
    with pytest.raises(TritonModelException, match="KIND_GAUGE does not support Observe"):
        metric.observe(1)


def test_a_histogram_counts_what_it_sees(measures: Measures, family: type[MetricFamily]) -> None:
    times = family("times", "how long", HISTOGRAM)
    metric = times.Metric(labels={"l": "x"}, buckets=[0.1, 1.0, 2.5])
    assert 'times_bucket{l="x",le="+Inf"} 0' in shown(measures)
    for value in (0.05, 0.1, 2.0, 6.0):
        metric.observe(value)
    assert shown(measures).splitlines()[2:] == [
        'times_bucket{l="x",le="0.1"} 2',
        'times_bucket{l="x",le="1"} 2',
        'times_bucket{l="x",le="2.5"} 3',
        'times_bucket{l="x",le="+Inf"} 4',
        'times_sum{l="x"} 8.15',
        'times_count{l="x"} 4',
    ]
    for call, name in ((metric.increment, "Increment"), (metric.set, "Set")):
        with pytest.raises(TritonModelException, match=f"KIND_HISTOGRAM does not support {name}"):
            call(1)
    with pytest.raises(TritonModelException, match="KIND_HISTOGRAM does not support Value"):
        metric.value()


def test_buckets_are_for_histograms_and_grow(family: type[MetricFamily]) -> None:
    times = family("times", "", HISTOGRAM)
    for buckets in (None, [2.5, 0.1], [1, 1, 2]):
        with pytest.raises(TritonModelException, match="Error when creating Metric: "):
            times.Metric(labels={}, buckets=buckets)
    times.Metric(labels={}, buckets=[])
    runs = family("runs", "", COUNTER)
    with pytest.raises(TritonModelException, match="Unexpected args found in counter Metric constructor"):
        runs.Metric(buckets=[1])


def test_equal_labels_are_one_metric_in_all_instances(measures: Measures) -> None:
    one, other = instance(measures), instance(measures)
    first, second = one("runs", "first", COUNTER), other("runs", "second", COUNTER)
    metrics = [each.Metric(labels={"model": "m"}) for each in (first, first, second)]
    for metric in metrics:
        metric.increment(1)
    assert [metric.value() for metric in metrics] == [3.0] * 3
    assert "# HELP runs first" in shown(measures)
    with pytest.raises(TritonModelException, match="metric family 'runs' is there already, as a counter"):
        other("runs", "", GAUGE)
    del first
    assert metrics[2].value() == 3.0
    assert "# HELP runs first" in shown(measures)
    for call in (metrics[0].value, lambda: metrics[0].increment(1)):
        with pytest.raises(TritonModelException, match="the corresponding 'MetricFamily' has been deleted"):
            call()
    del second
    assert shown(measures) == ""
    assert (measures.known, measures.count) == ({}, 0)


def test_what_an_instance_had_goes_with_it(measures: Measures) -> None:
    owner = Owner(measures)
    owner.act(Measure("open", 1, "runs", "", "counter"))
    owner.act(Measure("make", 1, labels=(("a", "b"),)))
    owner.close()
    assert (measures.known, measures.count) == ({}, 0)


@pytest.mark.parametrize("name", ["", "1st", "a b", "a{", "nv_gpu", "gateway_tasks", "process_cpu", "x\n"])
def test_names_that_are_none(family: type[MetricFamily], name: str) -> None:
    with pytest.raises(
        TritonModelException, match=r"(?s)Error when creating MetricFamily: .* cannot be a metric's name"
    ):
        family(name, "", COUNTER)
    allowed = family("vllm:tokens_total", "", COUNTER)
    with pytest.raises(TritonModelException, match="Error when creating Metric: 'a-b' cannot be a label's name"):
        allowed.Metric({"a-b": "c"})
    with pytest.raises(TritonModelException, match="'__name__' cannot be a label's name"):
        allowed.Metric({"__name__": "other"})
    with pytest.raises(TritonModelException, match="'le' cannot be a label's name"):
        family("waits", "", HISTOGRAM).Metric({"le": "1"}, buckets=[1])
    allowed.Metric({"le": "1"})


def test_there_are_only_so_many(measures: Measures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.engines.measures._MOST", 1)
    owner = Owner(measures)
    owner.act(Measure("open", 1, "runs", "", "counter"))
    owner.act(Measure("make", 1))
    with pytest.raises(ResourceExhausted, match="models keep 1 metrics"):
        owner.act(Measure("make", 1, labels=(("a", "b"),)))


async def test_a_fleet_shows_those_of_all_processes() -> None:
    processes = {name: Measures() for name in ("a", "b", "c")}
    kept = []
    for name, kind in (("a", COUNTER), ("b", COUNTER), ("c", GAUGE)):
        made = instance(processes[name])("runs", "of " + name, kind)
        made.Metric().increment(2)
        kept.append(made)
    times = instance(processes["b"])("times", "", HISTOGRAM)
    times.Metric(buckets=[1]).observe(3)

    async def ask(question: str) -> list[bytes]:
        assert question == module.QUESTION
        return [*(FleetMeasures(processes[name], name).answer() for name in "bc"), b"", b"nonsense"]

    text = write_metrics(await FleetMeasures(processes["a"], "a", ask, pools)()).decode()
    assert text.splitlines() == [
        "# HELP runs of a",
        "# TYPE runs counter",
        'runs{process="a"} 2',
        'runs{process="b"} 2',
        "# HELP times ",
        "# TYPE times histogram",
        'times_bucket{process="b",le="1"} 0',
        'times_bucket{process="b",le="+Inf"} 1',
        'times_sum{process="b"} 3',
        'times_count{process="b"} 1',
    ]


def test_a_description_is_one_line(measures: Measures, family: type[MetricFamily]) -> None:
    level = family("level", "a\\b\nc", GAUGE)
    level.Metric({"path": 'x\n"'})
    assert shown(measures).splitlines() == [r"# HELP level a\\b\nc", "# TYPE level gauge", r'level{path="x\n\""} 0']


async def test_others_are_not_asked_without_models_that_are_code() -> None:
    async def ask(_: str) -> list[bytes]:
        raise AssertionError

    assert await FleetMeasures(Measures(), "a", ask, lambda: pools("fake"))() == []


async def test_without_the_others_its_own_are_shown() -> None:
    async def away(_: str) -> list[bytes]:
        raise Unavailable("Redis is away")

    measures = Measures()
    kept = instance(measures)("runs", "", COUNTER)
    kept.Metric()
    assert [each.name for each in await FleetMeasures(measures, "a", away, pools)()] == ["runs"]


def test_a_kind_is_one_of_three(family: type[MetricFamily]) -> None:
    with pytest.raises(TritonModelException, match="kind must be one of"):
        family("runs", "", "counter")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        Owner(Measures()).act(Measure("open", 1, "1"))
