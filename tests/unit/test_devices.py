"""GPUs by NVML (the shipped fake), their health, and the CPU by /proc and /sys."""

import asyncio
import inspect
import logging
import sys
import threading
from collections import deque

import pytest

from gateway.devices import nvml as nvml_module
from gateway.devices.cpu import CpuMeter
from gateway.devices.fake_nvml import DRIVER_NOT_LOADED, GPU_IS_LOST, RESET_REQUIRED, FakeGpu, FakeNvml
from gateway.devices.health import FATAL_XIDS, Verdict, judge
from gateway.devices.kind import device_kind
from gateway.devices.monitor import GpuState, Monitor
from gateway.devices.nvml import Gpu, Nvml, Reading, gpus, open_nvml
from gateway.transport.device_metrics import DeviceMetrics, cpu_metrics, gpu_metrics
from tests.support import until

GIB = 1 << 30


@pytest.fixture(autouse=True)
def everything_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus.cache_clear()
    yield
    gpus.cache_clear()


@pytest.fixture
def events(caplog):
    caplog.set_level(logging.DEBUG, "gateway")
    return lambda name: [record.msg.fields for record in caplog.records if record.msg.name == name]


def names(*fakes):
    found = open_nvml(FakeNvml(*fakes))
    return [] if found is None else [(gpu.name, gpu.uuid) for gpu in found.gpus]


# --- finding them


def test_gpus_are_described():
    found = open_nvml(FakeNvml(FakeGpu("GPU-a", "NVIDIA H100", (9, 0), memory_total=80 * GIB)))
    assert found.gpus == (Gpu("gpu:0", "GPU-a", "NVIDIA H100", "90", 80 * GIB),)


def test_no_driver_is_no_gpu_and_said_at_debug_level(events):
    assert open_nvml(FakeNvml(fails=DRIVER_NOT_LOADED)) is None
    assert events("no_gpus") == [{"reason": "Driver Not Loaded"}]


def test_without_a_driver_the_package_is_not_even_imported(monkeypatch, events):
    monkeypatch.setattr(nvml_module, "_has_driver", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeGpu("GPU-a")))
    assert open_nvml() is None
    assert events("no_gpus") == [{"reason": "there is no NVIDIA driver"}]


def test_no_package_is_no_gpu(monkeypatch, events):
    monkeypatch.setattr(nvml_module, "_has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() is None
    assert events("no_gpus") == [{"reason": "the package nvidia-ml-py is not installed"}]


def test_a_driver_without_gpus_is_let_go_of():
    fake = FakeNvml()
    assert open_nvml(fake) is None
    assert fake.opened == 0


def test_a_driver_that_hangs_is_no_gpu(monkeypatch, events):
    monkeypatch.setattr(nvml_module, "_SECONDS", 0.01)
    fake = FakeNvml(FakeGpu("GPU-a"))
    fake.hangs = threading.Event()
    assert open_nvml(fake) is None
    assert events("no_gpus") == [{"reason": "the driver did not answer in 0 s"}]
    fake.hangs.set()


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("1,0", ["GPU-bb", "GPU-aa"]),
        ("GPU-b", ["GPU-bb"]),
        (" 1 , GPU-aa", ["GPU-bb", "GPU-aa"]),
        ("0,7,1", ["GPU-aa"]),  # as in CUDA: nothing after an entry that is no GPU
        ("0,GPU-x,1", ["GPU-aa"]),
        ("GPU-", []),  # of which of them?
        ("MIG-1,0", ["MIG-1", "GPU-aa"]),
        ("MIG-2", []),
        ("", []),
        ("-1", []),
    ],
)
def test_only_what_cuda_shows_is_there_in_its_order(monkeypatch, visible, uuids):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = names(FakeGpu("GPU-aa"), FakeGpu("GPU-bb"), FakeGpu("MIG-1"))
    assert found == [(f"gpu:{number}", uuid) for number, uuid in enumerate(uuids)]


def test_a_gpu_that_is_broken_from_the_start_is_left_out(events):
    assert names(FakeGpu("GPU-a", refuses=GPU_IS_LOST), FakeGpu("GPU-b")) == [("gpu:0", "GPU-b")]
    assert events("gpu_left_out") == [{"index": 0, "reason": "GPU is lost"}]


def test_a_gpu_without_memory_of_its_own_is_one():
    (gpu,) = open_nvml(FakeNvml(FakeGpu("GPU-a", lacks={"nvmlDeviceGetMemoryInfo"}))).gpus
    assert gpu.memory == 0


def test_the_kind_of_a_gpu_is_its_architecture(monkeypatch):
    monkeypatch.setattr(nvml_module, "_has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeGpu("GPU-a", capability=(8, 9)), FakeGpu("GPU-b")))
    assert [device_kind(f"gpu:{index}") for index in range(3)] == ["gpu:sm89", "gpu:sm90", "gpu:unknown"]


def test_the_fake_has_the_functions_of_the_real_one():
    real = pytest.importorskip("pynvml", reason="the package nvidia-ml-py is not installed")
    functions = {name: each for name, each in vars(FakeNvml).items() if name.startswith("nvml") and callable(each)}
    assert len(functions) > 15
    for name, function in functions.items():
        expected = list(inspect.signature(getattr(real, name)).parameters.values())
        required = [each for each in expected if each.default is each.empty]
        assert len(inspect.signature(function).parameters) - 1 == len(required), name
    for constant in ("NVML_TEMPERATURE_GPU", "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN", "nvmlEventTypeXidCriticalError"):
        assert getattr(real, constant) == getattr(FakeNvml, constant)
    for code, kind in (
        (3, "NVMLError_NotSupported"),
        (10, "NVMLError_Timeout"),
        (15, "NVMLError_GpuIsLost"),
        (16, "NVMLError_ResetRequired"),
    ):
        assert getattr(real, kind)().value == code


def test_the_real_library_without_a_driver_finds_nothing():
    real = pytest.importorskip("pynvml", reason="the package nvidia-ml-py is not installed")
    try:
        real.nvmlInit()
    except real.NVMLError:
        assert open_nvml(real) is None
    else:
        real.nvmlShutdown()
        pytest.skip("there is a driver")


# --- reading them


def test_a_reading_is_in_plain_units():
    fake = FakeGpu(
        "GPU-a", utilization=37, memory_used=5 * GIB, power=123_400, energy=2_500, temperature=61, throttle=0x24
    )
    (reading,) = Nvml(FakeNvml(fake)).read().values()
    assert reading == Reading(
        0.37, 5 * GIB, 80 * GIB, 123.4, 700.0, 2.5, 61, 89, frozenset({"sw_power_cap", "sw_thermal"})
    )  # fmt: skip


def test_what_a_gpu_does_not_tell_is_left_out():
    lacks = {
        "nvmlDeviceGetTotalEnergyConsumption",
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
    }
    (reading,) = Nvml(FakeNvml(FakeGpu("GPU-a", lacks=lacks))).read().values()
    assert (reading.energy, reading.power, reading.throttles) == (None, None, frozenset())
    assert (reading.temperature, reading.fault) == (40, "")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (GPU_IS_LOST, "fallen off the bus"),
        (RESET_REQUIRED, "nvidia-smi --gpu-reset"),
        (DRIVER_NOT_LOADED, "Driver Not Loaded"),
    ],
)
def test_a_broken_gpu_says_so_and_the_other_is_read(code, words):
    broken = FakeGpu("GPU-a")
    nvml = Nvml(FakeNvml(broken, FakeGpu("GPU-b")))
    broken.refuses = code
    readings = nvml.read()
    assert words in readings["gpu:0"].fault
    assert readings["gpu:0"].utilization is None
    assert readings["gpu:1"].fault == ""


def test_an_error_of_one_figure_is_no_fault_of_the_gpu():
    fake = FakeGpu("GPU-a")
    nvml = Nvml(FakeNvml(fake))
    fake.refuses = 999  # unknown
    assert nvml.read()["gpu:0"] == Reading()


def test_functions_that_a_package_has_not_are_not_asked(monkeypatch):
    nvml = Nvml(FakeNvml(FakeGpu("GPU-a")))
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetCurrentClocksThrottleReasons")
    (reading,) = nvml.read().values()
    assert (reading.throttles, reading.fault, reading.temperature) == (frozenset(), "", 40)


def test_xid_errors_are_told_once_of_the_gpu_that_had_them():
    first, second = FakeGpu("GPU-a"), FakeGpu("GPU-b")
    nvml = Nvml(FakeNvml(first, second))
    second.xids.extend([13, 79])
    first.xids.append(31)
    readings = nvml.read()
    assert (readings["gpu:0"].xids, readings["gpu:1"].xids) == ((31,), (13, 79))
    assert [reading.xids for reading in nvml.read().values()] == [(), ()]


def test_where_events_are_refused_all_else_is_read(events):
    nvml = Nvml(FakeNvml(FakeGpu("GPU-a", lacks={"nvmlDeviceRegisterEvents"}, xids=deque([79]))))
    assert nvml.read()["gpu:0"].xids == ()
    assert events("xid_errors_not_watched") == [{"reason": "Not Supported"}]


# --- health


@pytest.mark.parametrize(
    ("reading", "state", "words"),
    [
        (Reading(), "ok", ""),
        (Reading(throttles=frozenset({"sw_power_cap"})), "ok", ""),
        (Reading(throttles=frozenset({"hw_thermal"})), "degraded", "too hot"),
        (Reading(throttles=frozenset({"hw_power_brake", "sw_power_cap"})), "degraded", "power supply"),
        (Reading(temperature=90, slowdown_temperature=89), "degraded", "at 90 degrees Celsius, and slows down from 89"),
        (Reading(temperature=88, slowdown_temperature=89), "ok", ""),
        (Reading(fault="it has fallen off the bus; restart the machine"), "failed", "off the bus"),
        (Reading(xids=(13, 31, 43, 45, 94)), "ok", ""),  # of one process's work
        (Reading(xids=(13, 79)), "failed", "Xid 79: it has fallen off the bus; reset the GPU"),
    ],
)
def test_verdicts(reading, state, words):
    verdict = judge(reading)
    assert verdict.state == state
    assert words in verdict.reason
    assert bool(verdict.reason) == (state != "ok")


@pytest.mark.parametrize("xid", FATAL_XIDS)
def test_a_fatal_error_stays_one(xid):
    assert judge(Reading(), [xid]).state == "failed"


def test_a_changed_verdict_is_logged_once(events):
    state = GpuState(Gpu("gpu:0", "GPU-a", "", "90", 0))
    hot = Reading(throttles=frozenset({"hw_thermal"}))
    for reading in (Reading(), hot, hot, Reading(), Reading(xids=(79,)), Reading()):
        state.update(reading)
    assert [each["state"] for each in events("gpu_health")] == ["degraded", "ok", "failed"]
    assert state.verdict.state == "failed"
    assert state.xids == {79: 1}


async def test_a_monitor_reads_at_its_interval_and_knows_each_gpu():
    fake = FakeGpu("GPU-a", energy=1_000_000)
    async with Monitor(open_nvml(FakeNvml(fake)), 0.001).running() as monitor:
        assert monitor.states["gpu:0"].energy == 0.0
        assert monitor.verdict("gpu:0") == Verdict()
        fake.energy, fake.throttle = 1_004_500, 0x40
        await until(lambda: monitor.verdict("gpu:0").state == "degraded")
        assert monitor.states["gpu:0"].energy == 4.5
        fake.throttle = 0
        await until(lambda: monitor.verdict("gpu:0").state == "ok")
        assert monitor.verdict("cpu") == Verdict()


async def test_a_monitor_without_gpus_has_nothing_to_do():
    async with Monitor(None).running() as monitor:
        assert monitor.states == {}
        assert len(asyncio.all_tasks()) == 1


async def test_a_driver_that_stops_answering_is_a_failed_gpu_until_it_answers(monkeypatch):
    monkeypatch.setattr("gateway.devices.monitor._PATIENCE", 0.01)
    fake = FakeNvml(FakeGpu("GPU-a"))
    async with Monitor(open_nvml(fake), 0.001).running() as monitor:
        fake.hangs = hangs = threading.Event()
        await until(lambda: monitor.verdict("gpu:0").state == "failed")
        assert "the driver does not answer" in monitor.verdict("gpu:0").reason
        fake.hangs = None
        hangs.set()
        await until(lambda: monitor.verdict("gpu:0").state == "ok")


async def test_a_monitor_ends_though_the_driver_hangs(monkeypatch):
    monkeypatch.setattr("gateway.devices.monitor._PATIENCE", 0.01)
    fake = FakeNvml(FakeGpu("GPU-a"))
    async with Monitor(open_nvml(fake), 0.001).running() as monitor:
        fake.hangs = threading.Event()
        await until(lambda: monitor.verdict("gpu:0").state == "failed")
    fake.hangs.set()


async def test_a_library_that_fails_outright_is_what_is_reported():
    class Broken(FakeNvml):
        def nvmlDeviceGetUtilizationRates(self, gpu):  # noqa: N802 - NVML's name
            raise OSError("no such function")

    async with Monitor(open_nvml(Broken(FakeGpu("GPU-a"))), 0.001).running() as monitor:
        assert monitor.verdict("gpu:0") == Verdict("failed", "the driver cannot be asked: no such function")


# --- metrics


def samples(families):
    return {
        (family.name, *(value for key, value in sorted(labels.items()) if key != "gpu_uuid")): value
        for family in families
        for labels, value in family.samples
    }


def test_gpu_metrics_have_tritons_names_and_a_sample_for_each_gpu():
    first, second = GpuState(Gpu("gpu:0", "GPU-a", "", "90", 0)), GpuState(Gpu("gpu:1", "GPU-b", "", "90", 0))
    first.update(Reading(0.5, GIB, 80 * GIB, 100.0, 700.0, 10.0, 50, 89, frozenset({"hw_thermal"}), (79, 13, 13)))
    first.update(Reading(0.5, GIB, 80 * GIB, 100.0, 700.0, 12.5, 50, 89, frozenset({"hw_thermal"})))
    second.update(Reading(fault="it is gone"))
    families = gpu_metrics([first, second])
    told = samples([family for family in families if not family.name.startswith("gateway_gpu_healthy")])
    assert {name: told[(name,)] for name in (
        "nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_power_usage",
        "nv_gpu_power_limit", "nv_energy_consumption", "gateway_gpu_temperature_celsius",
    )} == {
        "nv_gpu_utilization": 0.5, "nv_gpu_memory_used_bytes": GIB, "nv_gpu_memory_total_bytes": 80 * GIB,
        "nv_gpu_power_usage": 100.0, "nv_gpu_power_limit": 700.0, "nv_energy_consumption": 2.5,
        "gateway_gpu_temperature_celsius": 50,
    }  # fmt: skip
    assert (told["gateway_gpu_xid_errors_total", "13"], told["gateway_gpu_xid_errors_total", "79"]) == (2, 1)
    (healthy,) = [family for family in families if family.name == "gateway_gpu_healthy"]
    assert healthy.samples == [({"gpu_uuid": "GPU-a"}, 0), ({"gpu_uuid": "GPU-b"}, 0)]
    (throttled,) = [family for family in families if family.name == "gateway_gpu_throttled"]
    assert ({"gpu_uuid": "GPU-a", "reason": "hw_thermal"}, 1) in throttled.samples
    assert sum(value for _, value in throttled.samples) == 1


def test_without_devices_there_are_no_metrics():
    assert gpu_metrics([]) == []
    assert (DeviceMetrics().gpus(), DeviceMetrics().cpu()) == ([], [])


# --- the CPU


def put(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


MEMINFO = "MemTotal:  1000 kB\nMemFree:  1 kB\nMemAvailable:  400 kB\nHugePages_Total:  0"


def test_ratios_are_of_the_time_since_the_last_reading(tmp_path):
    meter = CpuMeter(tmp_path)
    put(tmp_path, {"proc/stat": "cpu  100 0 100 600 100 0 0 100 0 0\ncpu0 1 1 1 1", "proc/meminfo": MEMINFO})
    first = meter.read()
    assert (first.utilization, first.steal) == (pytest.approx(0.3), pytest.approx(0.1))
    assert (first.memory_total, first.memory_used) == (1_024_000, 614_400)
    put(tmp_path, {"proc/stat": "cpu  150 0 100 610 100 0 0 140 90 0"})
    second = meter.read()
    assert (second.utilization, second.steal) == (pytest.approx(0.9), pytest.approx(0.4))
    assert meter.read().utilization == 0.0  # no time has passed


@pytest.mark.parametrize("stat", [None, "", "cpu nonsense", "cpu 1 2"])
def test_what_proc_does_not_tell_is_left_out(tmp_path, stat):
    if stat is not None:
        put(tmp_path, {"proc/stat": stat, "proc/meminfo": "nonsense"})
    reading = CpuMeter(tmp_path).read()
    assert cpu_metrics(reading) == []


def test_limits_and_throttling_of_control_groups_version_2(tmp_path):
    put(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/cpu.max": "150000 100000",
            "sys/fs/cgroup/a/cpu.stat": "usage_usec 9\nnr_periods 50\nnr_throttled 7\nthrottled_usec 2500000",
            "sys/fs/cgroup/a/b/cpu.stat": "usage_usec 9\nnr_throttled 0\nthrottled_usec 0",
            "sys/fs/cgroup/a/b/memory.max": "max",
            "sys/fs/cgroup/a/b/memory.current": "10",
            "sys/fs/cgroup/a/memory.max": "1000",
            "sys/fs/cgroup/a/memory.current": "600",
        },
    )
    reading = CpuMeter(tmp_path).read()
    assert reading.quota == 1.5
    assert (reading.throttling.periods, reading.throttling.seconds) == (7, 2.5)
    assert (reading.memory.limit, reading.memory.used) == (1000, 600)
    told = samples(cpu_metrics(reading))
    assert told["gateway_cpu_throttled_periods_total",] == 7
    assert told["gateway_cpu_throttled_seconds_total",] == 2.5
    assert (told["gateway_memory_limit_bytes",], told["gateway_memory_used_bytes",]) == (1000, 600)


def test_limits_and_throttling_of_control_groups_version_1(tmp_path):
    put(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/d\n3:memory:/m",
            "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/d/cpu.stat": "nr_periods 5\nnr_throttled 3\nthrottled_time 1500000000",
            "sys/fs/cgroup/memory/m/memory.limit_in_bytes": "4096",
            "sys/fs/cgroup/memory/m/memory.usage_in_bytes": "1024",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(0x7FFFFFFFFFFFF000),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "9999",
        },
    )
    reading = CpuMeter(tmp_path).read()
    assert (reading.quota, reading.throttling.periods, reading.throttling.seconds) == (2.0, 3, 1.5)
    assert (reading.memory.limit, reading.memory.used) == (4096, 1024)


def test_without_a_quota_nothing_is_throttled(tmp_path):
    put(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.stat": "nr_throttled 0\nthrottled_usec 0"})
    reading = CpuMeter(tmp_path).read()
    assert (reading.quota, reading.throttling, reading.memory) == (None, None, None)


def test_energy_counts_from_the_first_look_and_over_a_full_counter(tmp_path):
    rapl = "sys/class/powercap/intel-rapl:{}/{}"

    def counter(package, microjoules):
        put(tmp_path, {rapl.format(package, "energy_uj"): microjoules})

    for package in (0, 1):
        put(
            tmp_path,
            {
                rapl.format(package, "name"): f"package-{package}",
                rapl.format(package, "max_energy_range_uj"): 9_000_000,
            },
        )
        counter(package, 8_000_000)
    put(tmp_path, {"sys/class/powercap/intel-rapl:0:0/energy_uj": 5})  # a part of a package
    meter = CpuMeter(tmp_path)
    assert meter.read().energy == {"package-0": 0.0, "package-1": 0.0}
    counter(0, 8_500_000)
    assert meter.read().energy == {"package-0": 0.5, "package-1": 0.0}
    counter(0, 250_000)
    energy = samples(cpu_metrics(meter.read()))
    assert energy["gateway_cpu_energy_joules_total", "package-0"] == 1.25
    (tmp_path / rapl.format(1, "energy_uj")).unlink()  # or not readable, as for anyone but root
    assert list(meter.read().energy) == ["package-0"]


def test_this_machine_is_read():
    reading = CpuMeter().read()
    if sys.platform == "linux":
        assert reading.memory_total > 0
        assert 0.0 <= reading.utilization <= 1.0
        assert 0.0 <= reading.steal <= 1.0
