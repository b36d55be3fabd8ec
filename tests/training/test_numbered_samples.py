"""The order of an ordinary data set: every row once a pass, by the seed alone, with its place."""

from __future__ import annotations

from gkd_hf.training.numbered_samples import NumberedSamples, PassOrder


def rows(order: PassOrder) -> list[int]:
    return [row for _, row in order]


def test_each_pass_has_every_row_in_its_own_order() -> None:
    order = PassOrder(12, seed=3)
    samples = NumberedSamples([{"value": 10 * row} for row in range(12)], order)
    first = list(order)
    samples.set_epoch(1)
    second = list(order)
    assert [place for place, _ in first + second] == list(range(24))
    assert sorted(rows(order)) == list(range(12)) and [row for _, row in first] != rows(order)
    assert samples[second[0]] == {"value": 10 * second[0][1], "index": 12}
    assert rows(PassOrder(12, seed=3)) == [row for _, row in first] != rows(PassOrder(12, seed=4))
    assert len(order) == len(samples) == 12


def test_rows_in_their_own_order() -> None:
    order = PassOrder(5, seed=0, shuffle=False)
    NumberedSamples([{}] * 5, order).set_epoch(2)
    assert list(order) == [(10, 0), (11, 1), (12, 2), (13, 3), (14, 4)]
