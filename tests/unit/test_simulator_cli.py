"""`gateway simulate`: the table, the files, the recordings it replays, and what it says to a mistake."""

import builtins
import json

import pytest

from gateway.cli import main
from gateway.scheduling.simulator import POLICIES, Setup
from gateway.scheduling.simulator.fifo import Fifo
from gateway.scheduling.simulator.replay import read, replayed

HEADER = {"lockgate_recording": 1, "started": "2026-01-01T00:00:00Z", "version": "0", "sample": 1.0}
LINES = [
    {"t": 0.5, "model": "b", "version": "2", "rows": 3, "bytes": 12, "deadline_ms": 20.0, "priority": 1, "tenant": "x"},
    {"t": 0.25, "model": "a", "version": "", "rows": 1, "bytes": 4, "deadline_ms": None, "priority": 0, "tenant": "",
     "inputs": "1.npz", "later": "unknown"},
]  # fmt: skip
QUICK = [
    "--device",
    "16,1",
    "--deadline-ms",
    "200",
    "--seconds",
    "0.8",
    "--seeds",
    "2",
    "--policy",
    "triton",
    "timeout-0.5",
]


def record(folder, *lines, header=HEADER, name="arrivals-1.jsonl", end="\n"):
    text = "\n".join(json.dumps(line) if isinstance(line, dict) else line for line in (header, *lines))
    (folder / name).write_text(text + end)


def simulate(capsys, *arguments):
    status = main(["simulate", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_it_prints_a_table_of_fixed_width(capsys):
    status, out, err = simulate(capsys, "--load", "0.5", "1.5", *QUICK)
    lines = out.split("\n\n")[0].splitlines() + out.split("\n\n")[1].splitlines()
    assert (status, err) == (0, "")
    assert [line.split()[:3] for line in lines[1:]] == [
        ["poisson", "0.5", "triton"],
        ["poisson", "0.5", "timeout-0.5"],
        ["poisson", "1.5", "triton"],
        ["poisson", "1.5", "timeout-0.5"],
    ]
    column = lines[0].index("in time %")
    triton, timeout = (float(line[column:].split()[0]) for line in lines[3:])
    assert triton < 40 < timeout < 80
    assert len({line.index("policy") if number == 0 else line.index("t", 12) for number, line in enumerate(lines)}) == 1


def test_the_same_options_give_the_same_figures(capsys):
    assert simulate(capsys, "--load", "1.2", *QUICK) == simulate(capsys, "--load", "1.2", *QUICK)


@pytest.mark.slow
def test_it_writes_every_figure_as_json_and_a_plot(capsys, tmp_path):
    figures, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    options = [
        "--workload",
        "poisson",
        "zipf-4",
        "--load",
        "0.5",
        "1.5",
        "--json",
        str(figures),
        "--plot",
        str(picture),
    ]
    assert simulate(capsys, *options, *QUICK)[0] == 0
    cells = json.loads(figures.read_text())
    assert [(cell["workload"], cell["load"], cell["policy"]) for cell in cells] == [
        (workload, load, policy)
        for workload in ("poisson", "zipf-4")
        for load in (0.5, 1.5)
        for policy in ("triton", "timeout-0.5")
    ]
    assert all(len(cell["seeds"]) == len(cell["bounds"]) == 2 for cell in cells)
    assert set(cells[-1]["seeds"][0]["by_model"]) == {f"model-{rank}" for rank in range(1, 5)}
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_plot_without_matplotlib_names_the_extra(capsys, tmp_path, monkeypatch):
    genuine = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    status, out, err = simulate(capsys, "--load", "0.5", "--plot", str(tmp_path / "p.png"), *QUICK)
    assert status == 1
    assert "poisson" in out
    assert (
        err == "gateway simulate: a plot needs matplotlib, which is not installed: pip install 'lockgate[simulate]'\n"
    )


def test_it_replays_a_recording(capsys, tmp_path):
    requests = [{**LINES[0], "t": 0.002 * number, "model": "ab"[number % 2]} for number in range(50)]
    record(tmp_path, *reversed(requests))
    figures = tmp_path / "figures.json"
    options = ["--replay", str(tmp_path), "--json", str(figures), "--seeds", "1", "--policy", "triton"]
    status, out, _ = simulate(capsys, *options)
    assert status == 0
    assert out.splitlines()[1].split()[:3] == ["recorded", "1", "triton"]
    seed = json.loads(figures.read_text())[0]["seeds"][0]
    assert seed["offered"] == 50
    assert set(seed["by_model"]) == {"a:2", "b:2"}


def test_a_recording_is_read_by_time_and_keeps_what_was_asked(tmp_path):
    record(tmp_path, *LINES)
    record(tmp_path, {"t": 0.3, "model": "c"}, name="arrivals-2.jsonl")
    first, second, third = read(tmp_path)
    assert (first.time, first.model, first.deadline, first.rows) == (0.25, "a", None, 1)
    assert (second.model, second.rows, second.priority) == ("c", 1, 0)
    assert (third.model, third.deadline, third.rows, third.size) == ("b:2", 0.02, 3, 12)
    assert (third.priority, third.tenant) == (1, "x")


def test_a_replay_at_twice_the_speed_takes_half_the_time(tmp_path):
    record(tmp_path, *LINES)
    there = replayed(read(tmp_path), Setup(deadline=0.07), speed=2.0)
    played = there.arrivals(None)
    assert [(arrival.time, arrival.deadline) for arrival in played] == [(0.125, 0.07), (0.25, 0.02)]
    assert there.seconds == 0.25


def test_a_line_that_was_cut_off_by_the_servers_end_is_passed_over(tmp_path):
    record(tmp_path, LINES[1], '{"t": 1.0, "mod', end="")
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize(
    ("lines", "header", "text"),
    [
        ((LINES[0], "nonsense", LINES[1]), HEADER, "arrivals-1.jsonl, line 3: not a recorded request"),
        (({"t": 1.0},), HEADER, "line 2: not a recorded request: KeyError('model')"),
        ((), HEADER, "hold no request"),
        ((LINES[0],), {"lockgate_recording": 2}, "not a recording of format 1"),
        ((LINES[0],), "[]", "not a recording of format 1"),
        ((LINES[0],), "<html>", "not a recording of format 1"),
    ],
)
def test_a_recording_that_cannot_be_read_is_named(capsys, tmp_path, lines, header, text):
    record(tmp_path, *lines, header=header)
    status, _, err = simulate(capsys, "--replay", str(tmp_path))
    assert status == 1
    assert err.startswith("gateway simulate: ")
    assert text in err
    assert err.count("\n") == 1


def test_a_folder_without_recordings_says_what_was_looked_for(capsys, tmp_path):
    status, _, err = simulate(capsys, "--replay", str(tmp_path))
    assert status == 1
    assert "arrivals-*.jsonl" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workload", "tsunami"], "invalid choice: 'tsunami'"),
        (["--policy", "none"], "invalid choice: 'none'"),
        (["--load", "-1"], "'-1' is not a number greater than 0"),
        (["--load", "nan"], "'nan' is not a number greater than 0"),
        (["--seconds", "inf"], "'inf' is not a number greater than 0"),
        (["--deadline-ms", "soon"], "'soon' is not a number greater than 0"),
        (["--device", "4"], "such as 4,0.25"),
        (["--device", "4,0"], "'0' is not a number greater than 0"),
        (["--max-batch", "0"], "'0' is not a whole number of 1 or more"),
        (["--noise-percent", "101"], "'101' is not a number from 0 to 100"),
        (["--sedes", "3"], "unrecognized arguments: --sedes 3"),
    ],
)
def test_a_bad_option_is_explained(capsys, arguments, text):
    with pytest.raises(SystemExit) as stop:
        main(["simulate", *arguments])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_a_deadline_that_no_row_meets_is_explained(capsys):
    status, _, err = simulate(capsys, "--deadline-ms", "4")
    assert status == 1
    assert "a deadline of 4 ms is shorter than the 4.25 ms of a single row" in err


def test_a_file_that_cannot_be_written_is_explained(capsys, tmp_path):
    status, out, err = simulate(capsys, "--load", "0.5", "--json", str(tmp_path / "no" / "f.json"), *QUICK)
    assert status == 1
    assert "poisson" in out
    assert "No such file" in err


def test_a_policy_that_breaks_its_contract_is_named(capsys, monkeypatch):
    class Forgetful(Fifo):
        """Loses every job."""

        def add(self, lane, job, now):
            pass

    monkeypatch.setitem(POLICIES, "triton", lambda _: Forgetful())
    status, out, err = simulate(capsys, "--load", "0.5", "--seconds", "0.1", "--policy", "triton")
    assert (status, out) == (1, "")
    assert "triton on poisson at 0.5, seed 1: " in err
    assert "requests have no outcome" in err


def test_the_usage_tells_of_it(capsys):
    assert main(["--help"]) == 0
    assert "simulate" in capsys.readouterr().out
