"""The arms of a benchmark take turns, and ratios are those of one round."""

from __future__ import annotations

import pytest

from gkd_hf.benchmarks.timing import check_device, machine, ratio, say, timed_in_turn, use_threads
from gkd_hf.errors import InputError


def test_arms_take_turns_in_alternating_order():
    calls: list[str] = []
    seconds = timed_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert all(time >= 0 for times in seconds.values() for time in times)


def test_a_ratio_is_the_median_of_the_rounds():
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"rounds": 1, "warmup": -1}])
def test_impossible_rounds_are_refused(settings):
    with pytest.raises(InputError, match="rounds is"):
        timed_in_turn({"a": lambda: None}, **settings)


def test_the_machine_is_named():
    assert machine()["device"]
    assert machine()["threads"] >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [(("tpu",), "device is 'tpu'"), (("cpu", "fp16"), "precision is 'fp16'")],
)
def test_where_nothing_can_be_measured_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        check_device(*settings)


def test_less_than_one_thread_is_refused():
    with pytest.raises(InputError, match="threads is 0"):
        use_threads(0)


def test_what_is_under_way_is_told_beside_the_figures(capsys):
    say("timing")
    assert capsys.readouterr() == ("", "timing\n")
