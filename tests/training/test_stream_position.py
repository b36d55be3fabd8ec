"""A resumed run sees exactly the samples that the uninterrupted one would have seen, or says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import set_seed

from gkd_hf.data.mixing import Source
from gkd_hf.data.shards import open_rows
from gkd_hf.data.streaming import SampleStream
from gkd_hf.data.toy_city import write_shards
from gkd_hf.data.transforms import DistillationTransform
from gkd_hf.errors import InputError
from gkd_hf.models.modeling_gkd import GKDStudentModel
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.arguments import GKDDistillationArguments
from gkd_hf.training.distillation_trainer import GKDDistillationTrainer
from gkd_hf.training.stream_position import order_facts
from tests.tiny import ENCODERS
from tests.training.test_trainers import SIZE, STATISTICS, StopAt, arguments

ROWS = {"clear_day": 11, "night": 7}


@pytest.fixture(scope="module")
def cities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cities")
    for style, count in ROWS.items():
        write_shards(folder / style, style, "train", count, size=SIZE, seed=0, progress=False)
    return folder


def trainer(folder: Path, cities: Path, weights: list[float | None], seed: int = 0, **changes: Any) -> Any:
    set_seed(0)
    sources = [
        Source(open_rows(cities / style, "train", columns=("image",)), style, None, weight)
        for style, weight in zip(ROWS, weights, strict=True)
    ]
    transform = DistillationTransform(SIZE, *STATISTICS, rand_augment=False)
    stream = SampleStream.mixed(sources, transform, seed=seed, micro_batch_size=1)
    made = GKDDistillationTrainer(
        GKDStudentModel.from_encoder(ENCODERS["vit"]),
        GKDTeacher(ENCODERS["dinov2"]),
        arguments(GKDDistillationArguments, folder, max_steps=8, mask_probability=0.0, **changes),
        stream,
    )
    collate = made.data_collator

    def remember(samples: list[dict]) -> dict:
        batch = collate(samples)
        batch["seen"] = [(sample["index"], sample["pixel_values"].sum().item()) for sample in samples]
        return batch

    made.data_collator = remember
    made.seen = []
    compute_loss = made.compute_loss

    def noting(model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        made.seen += inputs.pop("seen")
        return compute_loss(model, inputs, *args, **kwargs)

    made.compute_loss = noting
    return made


def interrupted(made: Any, step: int) -> list[tuple[int, float]]:
    made.add_callback(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        made.train(resume_from_checkpoint=True)
    return made.seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("weights", [[None, None], [1.0, 3.0]], ids=["by images", "by weights"])
def test_resumed_twice(weights: list[float | None], workers: int, cities: Path, tmp_path: Path) -> None:
    settings = {"dataloader_num_workers": workers, "dataloader_prefetch_factor": 2 if workers else None}
    whole = trainer(tmp_path / "whole", cities, weights, **settings)
    whole.train()
    assert [index for index, _ in whole.seen] == list(range(8 * 4))  # nearly two passes of 18 rows
    first = interrupted(trainer(tmp_path / "broken", cities, weights, **settings), 3)
    second = interrupted(trainer(tmp_path / "broken", cities, weights, **settings), 5)
    third = trainer(tmp_path / "broken", cities, weights, **settings)
    third.train(resume_from_checkpoint=True)
    assert first == whole.seen[:12]
    assert second == whole.seen[8:20]  # from the checkpoint of step 2
    assert third.seen == whole.seen[16:]


def test_another_batch_size_goes_on_with_the_next_sample(cities: Path, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", cities, [None, None])
    whole.train()
    interrupted(trainer(tmp_path / "broken", cities, [None, None]), 3)
    state = json.loads((tmp_path / "broken" / "checkpoint-2" / "trainer_state.json").read_text())
    position = state["stateful_callbacks"]["StreamPosition"]["attributes"]
    assert position["samples"] == 8
    night = position["order"]["domains"][1]
    assert (night["name"], night["rows"], night["weight"]) == ("night", 7, None)
    smaller = trainer(tmp_path / "broken", cities, [None, None], per_device_train_batch_size=2)
    smaller.train(resume_from_checkpoint=True)
    assert smaller.seen == whole.seen[8 : 8 + 6 * 2]
    odd = trainer(tmp_path / "broken", cities, [None, None], per_device_train_batch_size=3)
    odd.args.max_steps = 9
    with pytest.raises(InputError, match="cannot resume at sample 20: it is not a multiple of the batch of 3"):
        odd.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-8"))


@pytest.mark.parametrize("changed", ["seed", "weights", "rows", "shards", "order of the domains"])
def test_another_order_is_refused(changed: str, cities: Path, tmp_path: Path) -> None:
    interrupted(trainer(tmp_path / "run", cities, [1.0, 3.0]), 3)
    seed = 1 if changed == "seed" else 0
    weights = [1.0, 2.0] if changed == "weights" else [1.0, 3.0]
    other = cities
    if changed in ("rows", "shards"):
        other = tmp_path / "cities"
        for style, count in ROWS.items():
            write_shards(other / style, style, "train", count + (changed == "rows"), size=SIZE, seed=0, progress=False)
        if changed == "shards":  # the same rows, in another cut
            shard = max((other / "night").rglob("*.parquet"), key=lambda path: pq.read_metadata(path).num_rows)
            pq.write_table(pq.read_table(shard), shard, row_group_size=1)
    again = trainer(tmp_path / "run", other, weights, seed=seed)
    if changed == "order of the domains":
        again.train_dataset.sources = again.train_dataset.sources[::-1]
        again._position._order = order_facts(again.train_dataset)
    key = "seed was 0 and is 1 now" if changed == "seed" else "domains was .* and is .* now"
    with pytest.raises(InputError, match=f"checkpoint-2': {key}, so the samples would come in another order"):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_position_is_refused(cities: Path, tmp_path: Path) -> None:
    without = trainer(tmp_path / "run", cities, [None, None])
    without.remove_callback(without._position)
    interrupted(without, 3)
    with pytest.raises(InputError, match="does not tell the position in the data"):
        trainer(tmp_path / "run", cities, [None, None]).train(resume_from_checkpoint=True)
