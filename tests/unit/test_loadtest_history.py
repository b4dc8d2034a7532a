"""The history checker says whether the gateway kept its promises, so each fault is planted here and must be found."""

import msgspec
import pytest

from loadtest.history import LOST, UNANSWERED, UNSENT, History, Record, Run, Writer, check, main, read

RUN = Run("a", 100, 1000.0)
EXPIRED = "Request timeout expired"


def good(number=0, took=0.01, **more):
    fields = {"status": 200, "answer": 7000 + number, **more}
    return Record(number, 7000 + number, number / 10, number / 10 + took, **fields)


def history(*changed, run=RUN):
    """All of the run's requests, answered well but for these."""
    numbers = {record.id for record in changed}
    return History(run, [*(good(number) for number in range(run.requests) if number not in numbers), *changed])


def verdict(*changed, run=RUN):
    return check([history(*changed, run=run)])


def test_a_good_run_has_no_fault():
    found = verdict()
    assert found.faults(late_share=0.0) == []
    assert (found.requests, found.accepted, found.late, dict(found.statuses)) == (100, 100, 0, {200: 100})
    assert found.slowest == pytest.approx(0.01)
    assert found.gap == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changed", "file", "names"),
    [
        ([good(3, status=UNANSWERED, answer=None)], "missing", ["a:3"]),
        ([Record(3, 7003, 0.3, None, 200, 7003)], "missing", ["a:3"]),
        ([Record(3, 7003, 0.3, None, LOST)], "lost", ["a:3"]),
        ([Record(3, 7003, 0.3, None, UNSENT)], "unsent", ["a:3"]),
        ([good(3), good(3)], "twice", ["a:3"]),
        ([Record(-1, 0, 0.3, 0.3, 200, 7003)], "twice", ["a:3"]),
        ([Record(-1, 0, 0.3, 0.3, 200, 1)], "twice", ["a:?"]),
        ([Record(-1, 0, 0.3, 0.3, 500)], "twice", ["a:?"]),
        ([good(3, answer=7004), good(4, answer=7003)], "wrong", ["a:3", "a:4"]),
        ([good(3, answer=1)], "wrong", ["a:3"]),
        ([good(3, answer=None)], "wrong", ["a:3"]),
        ([good(3, took=1.101)], "overdue", ["a:3"]),
        ([good(3, took=1.101, status=503, answer=None)], "overdue", ["a:3"]),
    ],
)
def test_each_fault_is_found_and_no_other(changed, file, names):
    found = verdict(*changed)
    assert getattr(found, file) == names
    assert len(found.faults()) == 1
    assert found.faults()[0].startswith(f"{len(names)} ")
    assert names[0] in found.faults()[0]
    assert found.faults()[0] in str(found)


def test_an_answer_that_another_has_had_is_both_wrong_and_a_second_one():
    found = verdict(good(3, answer=7004))
    assert (found.wrong, found.twice) == (["a:3"], ["a:4"])


def test_a_request_without_a_line_is_missing():
    whole = history()
    assert check([History(RUN, [each for each in whole.records if each.id not in (0, 99)])]).missing == ["a:0", "a:99"]
    assert check([History(RUN, [])]).missing == [f"a:{number}" for number in range(100)]
    endless = History(Run("a"), [each for each in whole.records if each.id not in (50, 99)])
    assert check([endless]).missing == ["a:50"]


def test_what_is_answered_within_the_grace_is_late_but_not_overdue():
    found = verdict(good(3, took=1.05))
    assert (found.late, found.overdue) == (1, [])
    assert found.faults(late_share=0.01) == []
    assert found.faults(late_share=0.009) == ["1.000% of the accepted were late, at most 0.900% may be"]


def test_late_is_what_was_accepted_and_not_answered_in_time():
    found = verdict(
        good(0, status=504, answer=None, error=EXPIRED),
        good(1, status=504, answer=None, error="deadline below service time: not even an idle worker"),
        good(2, status=429, answer=None, error="it would be answered in 5.2 ms"),
        good(3, status=429, answer=None, error="the request was dropped so that others keep their deadline"),
        good(4, status=503, answer=None, error="Server not ready"),
    )
    assert (found.accepted, found.late) == (97, 1)
    assert found.late_share == 1 / 97
    assert found.faults() == []


def test_errors_are_counted_by_status_and_text_without_their_numbers():
    found = verdict(
        *[good(n, status=429, answer=None, error=f"answered in {n}.5 ms") for n in range(3)],
        good(9, status=500, answer=None),
    )
    assert dict(found.statuses) == {200: 96, 429: 3, 500: 1}
    assert dict(found.errors) == {"429 answered in # ms": 3, "500": 1}
    assert "3 x 429 answered in # ms" in str(found)


def test_without_a_deadline_nothing_is_late():
    found = verdict(good(3, took=1000.0), run=Run("a", 100))
    assert found.faults(late_share=0.0) == []
    assert found.slowest == 1000.0


def test_so_many_connections_may_be_lost_as_is_said():
    found = verdict(*[Record(number, 0, 0.0, None, LOST) for number in range(3)])
    assert found.faults(lost=3) == []
    assert len(found.faults(lost=2)) == 1


def test_the_longest_time_without_an_answer_is_that_of_all_clients_together():
    slow = verdict(*[Record(number, 0, 0.0, None, LOST) for number in range(10, 20)])
    assert slow.gap == pytest.approx(1.1)
    assert check([slow_history(), history(run=Run("b", 100))]).gap == pytest.approx(0.1)


def slow_history():
    return history(*[Record(number, 0, 0.0, None, LOST) for number in range(10, 20)])


def test_two_clients_do_not_hide_each_others_faults():
    found = check([history(good(3), good(3)), history(Record(4, 0, 0.0, None, UNANSWERED), run=Run("b", 100))])
    assert (found.requests, found.twice, found.missing) == (200, ["a:3"], ["b:4"])


def test_a_history_comes_back_from_its_file(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = history(good(3, status=429, answer=None, error='tro"uble\n', attempts=3, port=8000))
    with Writer(path, RUN) as writer:
        for record in whole.records:
            writer.add(record)
    assert read(path) == whole
    assert len(path.read_bytes().splitlines()) == 101


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    with Writer(path, RUN) as writer:
        writer.add(good(0))
        writer.add(good(1))
    path.write_bytes(path.read_bytes()[:-5])
    assert [record.id for record in read(path).records] == [0]
    path.write_bytes(b"")
    assert read(path).records == []


def test_a_damaged_line_is_not_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    with Writer(path, RUN) as writer:
        writer.add(good(0))
    path.write_bytes(path.read_bytes().replace(b'"sent"', b'"went"'))
    with pytest.raises(msgspec.ValidationError):
        read(path)


def test_the_command_fails_when_there_is_a_fault(tmp_path, capsys):
    for name, records in (("good", [good(0)]), ("bad", [good(0), good(0)])):
        with Writer(tmp_path / name, Run("a", 1, 1000.0)) as writer:
            for record in records:
                writer.add(record)
    assert main([str(tmp_path / "good")]) == 0
    assert main([str(tmp_path / "good"), str(tmp_path / "bad")]) == 1
    assert "1 answered twice: a:0" in capsys.readouterr().out
