"""The order of an ordinary data set: every row once a pass, by the seed alone, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, SequentialSampler, TensorDataset

from gkd_hf import GKDDistillationArguments, GKDDistillationTrainer, GKDStudentModel, GKDTeacher
from gkd_hf.training.numbered_samples import NumberedSamples, PassOrder
from tests.tiny import ENCODERS
from tests.training.test_trainers import SIZE, arguments


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
    assert samples[second[0]] == {"value": 10 * second[0][1], "place_in_run": 12}
    assert rows(PassOrder(12, seed=3)) == [row for _, row in first] != rows(PassOrder(12, seed=4))
    assert len(order) == len(samples) == 12


def test_rows_in_their_own_order() -> None:
    order = PassOrder(5, seed=0, shuffle=False)
    NumberedSamples([{}] * 5, order).set_epoch(2)
    assert list(order) == [(10, 0), (11, 1), (12, 2), (13, 3), (14, 4)]


def test_a_batch_is_read_at_once_and_samples_stay_what_they_are() -> None:
    class Batches(list):
        def __getitems__(self, rows: list[int]) -> list[Any]:
            return [{"fetched": row} for row in rows]

    places_and_rows = [(7, 2), (8, 0)]
    fetched = NumberedSamples(Batches(range(3)), PassOrder(3, seed=0)).__getitems__(places_and_rows)
    assert fetched == [{"place_in_run": 7, "fetched": 2}, {"place_in_run": 8, "fetched": 0}]
    rows = [{"index": "a"}, (1, 2), {"index": "c"}]
    one_by_one = NumberedSamples(rows, PassOrder(3, seed=0)).__getitems__([(0, 1), *places_and_rows])
    assert one_by_one == [(1, 2), {"place_in_run": 7, "index": "c"}, {"place_in_run": 8, "index": "a"}]


def make(
    data: Any, folder: Path, kind: type[GKDDistillationTrainer] = GKDDistillationTrainer, **more: Any
) -> GKDDistillationTrainer:
    settings = arguments(GKDDistillationArguments, folder, max_steps=1, save_strategy="no")
    student, teacher = GKDStudentModel.from_encoder(ENCODERS["vit"]), GKDTeacher(ENCODERS["dinov2"])
    return kind(student, teacher, settings, data, **more)


class Counted(IterableDataset):
    """A stream that knows how long it is."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Any:
        yield from ({"pixel_values": torch.zeros(3, SIZE, SIZE)} for _ in range(8))


class InRows(GKDDistillationTrainer):
    """Rows in an order of the user's own."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def test_streams_with_a_length_and_samples_without_names_train(tmp_path: Path) -> None:
    counted = make(Counted(), tmp_path)
    counted.train()
    assert counted.state.global_step == 1

    def collate(samples: list[tuple[torch.Tensor]]) -> dict[str, Any]:
        pixels = torch.stack([sample[0] for sample in samples])
        none = {"mask_rows": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 16, dtype=torch.bool)}
        return {"pixel_values": pixels, "grid": (4, 4), **none}

    unnamed = make(TensorDataset(torch.zeros(8, 3, SIZE, SIZE)), tmp_path, data_collator=collate)
    unnamed.train()
    assert unnamed.state.global_step == 1


@pytest.mark.parametrize("kind", [InRows, GKDDistillationTrainer])
def test_a_users_own_order_and_index_are_kept(kind: type[GKDDistillationTrainer], tmp_path: Path) -> None:
    data = [{"pixel_values": torch.zeros(3, SIZE, SIZE), "index": 100 + row} for row in range(8)]
    trainer = make(data, tmp_path, kind, data_collator=lambda samples: {"own": [each["index"] for each in samples]})
    seen = [index for batch in trainer.get_train_dataloader() for index in batch["own"]]
    assert sorted(seen) == list(range(100, 108))
    assert (seen == sorted(seen)) == (kind is InRows)


def test_an_index_of_the_samples_own_does_not_decide_masks(tmp_path: Path) -> None:
    data = [{"pixel_values": torch.zeros(3, SIZE, SIZE)} for _ in range(8)]
    named = [sample | {"index": f"row {row}"} for row, sample in enumerate(data)]
    ours, expected = (next(iter(make(each, tmp_path).get_train_dataloader())) for each in (named, data))
    assert torch.equal(ours["masks"], expected["masks"]) and torch.equal(ours["mask_rows"], expected["mask_rows"])
