"""The question to the NVIDIA driver: against none, and against stand-ins for its library that answer, crash and hang."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import errors
from gateway.engines import driver

STAND_IN = """
#include <string.h>
#include <stdlib.h>
#include <unistd.h>
int cuInit(unsigned flags) { %s }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceGetCount(int *count) { *count = %d; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 - device : 0; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strcpy(name, "Stand-in"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 1ul << 33; return 0; }
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that puts a library in the place of the driver's: what its cuInit does, and how many GPUs it sees."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler to make a stand-in for libcuda.so.1")

    def make(init: str = "return 0;", gpus: int = 2) -> None:
        source = tmp_path / "cuda.c"
        source.write_text(STAND_IN % (init, gpus))
        library = tmp_path / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))

    return make


def refusal(seconds: float = 10.0) -> str:
    with pytest.raises(errors.Unavailable) as caught:
        driver.ask(seconds)
    return caught.value.message


def test_a_driver_and_its_gpus(stand_in) -> None:
    stand_in()
    found = driver.ask(10.0)
    assert found.cuda == "13.2"
    assert [(gpu.index, gpu.name, gpu.sm, gpu.memory) for gpu in found.gpus] == [
        (0, "Stand-in", "90", 1 << 33),
        (1, "Stand-in", "80", 1 << 33),
    ]
    assert found.gpu(1).sm == "80"
    with pytest.raises(errors.Unavailable, match="there is no GPU 2; the driver sees 2, counted from 0"):
        found.gpu(2)


def test_an_answer_is_kept_and_a_failure_is_not(stand_in) -> None:
    driver.probe.cache_clear()
    stand_in("return 999;")
    with pytest.raises(errors.Unavailable):
        driver.probe()
    stand_in()
    found = driver.probe()
    stand_in("return 999;")
    assert driver.probe() is found
    driver.probe.cache_clear()


@pytest.mark.parametrize(
    ("init", "gpus", "text"),
    [
        ("return 100;", 1, "cuInit gave error 100: it sees no GPU; check that one is plugged in"),
        ("return 803;", 1, "error 803: library and kernel module are of different versions; restart the machine"),
        ("return 12345;", 1, "error 12345: `nvidia-smi` and the kernel's log say more"),
        ("return 0;", 0, "it sees no GPU"),
        ("abort();", 1, "the process that asked the NVIDIA driver ended with signal 6: the driver is broken"),
        ("_exit(3);", 1, "the process that asked the NVIDIA driver ended with status 3: the driver is broken"),
    ],
)
def test_a_driver_that_does_not_work(stand_in, init: str, gpus: int, text: str) -> None:
    stand_in(init, gpus)
    assert text in refusal()


@pytest.mark.slow
def test_a_driver_that_hangs_is_given_up(stand_in) -> None:
    stand_in("pause(); return 0;")
    assert refusal(1.0).startswith("the NVIDIA driver did not answer within 1 s; `nvidia-smi` will hang too")


def test_no_driver() -> None:
    if driver.present():
        pytest.skip("there is an NVIDIA driver here")
    assert refusal() == (
        "no NVIDIA driver: libcuda.so.1 is missing; install the driver or, in a container, start it with --gpus all"
    )


def test_traces_of_a_driver(tmp_path: Path) -> None:
    assert not driver.present(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert driver.present(tmp_path)
