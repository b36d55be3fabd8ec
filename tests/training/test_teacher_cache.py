"""The teacher cache in a training: the numbers of recomputation, never those of another view, also after a restart."""

from __future__ import annotations

import errno
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from gkd_hf import GKDDistillationArguments, GKDDistillationTrainer, GKDStudentModel, GKDTeacher, InputError
from gkd_hf.data.streaming import SampleStream
from gkd_hf.data.toy_city import toy_city
from gkd_hf.data.transforms import DistillationTransform
from gkd_hf.data.views import view_keys
from gkd_hf.distillation import token_store
from gkd_hf.distillation.token_store import TokenStore
from gkd_hf.models.encoders import EncoderOutput
from gkd_hf.training.teacher_cache import TeacherCache, teacher_identity
from tests.tiny import ENCODERS
from tests.training.test_trainers import SIZE, STATISTICS, StopAt, arguments, assert_equal, weights

ROWS, BATCH, STEPS = 10, 4, 5  # two passes; the third batch reaches over the end of the first


def stream(views: int | None = 1, seed: int = 0, size: int = SIZE) -> SampleStream:
    transform = DistillationTransform(size, *STATISTICS, rand_augment=False, erase_probability=0.5)
    rows = toy_city("clear_day", ROWS, size=SIZE, seed=0)
    return SampleStream(rows, transform, seed=seed, micro_batch_size=1, domain="toy_city", views=views)


def trainer(
    folder: Path,
    cache: Path | None,
    *,
    teachers: tuple[str, ...] = ("dinov2",),
    data: SampleStream | None = None,
    **changes: Any,
) -> GKDDistillationTrainer:
    set_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    set_seed(1)
    given = [GKDTeacher(ENCODERS[name]) for name in teachers]
    settings = {
        "max_steps": STEPS,
        "logging_steps": 1,
        "teacher_cache": None if cache is None else str(cache),
    } | changes
    return GKDDistillationTrainer(
        student,
        given,
        arguments(GKDDistillationArguments, folder, per_device_train_batch_size=BATCH, **settings),
        data or stream(),
    )


def losses(made: GKDDistillationTrainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def never_asked(made: GKDDistillationTrainer) -> GKDDistillationTrainer:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was asked")

    for teacher in made.teachers:
        teacher.forward = refuse
    return made


@pytest.mark.parametrize("teachers", [("dinov2",), ("dinov2", "resnet")], ids=["one", "two"])
def test_a_warm_cache_gives_the_training_of_a_cold_one(teachers: tuple[str, ...], tmp_path: Path) -> None:
    cold = trainer(tmp_path / "cold", tmp_path / "cache", teachers=teachers)
    cold.train()
    assert len(list((tmp_path / "cache").iterdir())) == len(teachers)
    assert all(each.found == ROWS for each in cold._teaching.caches)
    warm = trainer(tmp_path / "warm", tmp_path / "cache", teachers=teachers)
    if len(teachers) == 1:  # the tokens of several are standardised by what they say of the first images
        never_asked(warm)
    warm.train()
    assert all(each.found == each.seen == STEPS * BATCH for each in warm._teaching.caches)
    assert losses(warm) == losses(cold)
    assert_equal(weights(warm), weights(cold))
    assert f"{2 * ROWS * len(teachers)} of {2 * ROWS * len(teachers)} views were there" in warm.cache.told()


def test_the_numbers_are_those_of_a_training_without_a_cache(tmp_path: Path) -> None:
    """But for the rounding of tokens to bf16, whose relative error is 2^-9 at most."""
    plain, cached = trainer(tmp_path / "plain", None), trainer(tmp_path / "cached", tmp_path / "cache")
    plain.train()
    cached.train()
    assert plain.cache is None
    assert losses(cached) == pytest.approx(losses(plain), rel=2**-8)
    assert losses(cached) != losses(plain)


def batch_of(made: GKDDistillationTrainer) -> dict[str, Any]:
    return next(iter(made.get_train_dataloader()))


def test_cached_tokens_are_those_that_are_computed(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", tmp_path / "cache")
    batch = batch_of(made)
    pixels, grid = made.train_dataset.normalised(batch), tuple(batch["grid"])
    (computed,) = made.teach(pixels, grid)
    (first,) = made.teach(pixels, grid, batch["view_keys"])
    made.cache.on_train_end()
    again = never_asked(trainer(tmp_path / "again", tmp_path / "cache"))
    (cached,) = again.teach(pixels, grid, batch["view_keys"])
    for taken in (first, cached):
        for name in ("cls", "patches"):
            expected = computed.__dict__[name].to(torch.bfloat16).float()
            assert torch.equal(taken.__dict__[name], expected)
            assert taken.__dict__[name].dtype == torch.float32
    # In a batch of another size the last bit of fp32 may differ, and with it, rarely, that of bf16.
    alone = made.teach(pixels[:1], grid)[0].patches
    torch.testing.assert_close(cached.patches[:1], alone, rtol=2**-8, atol=1e-6)


def test_a_batch_that_lacks_a_view_takes_only_that_from_the_teacher(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", tmp_path / "cache")
    batch = batch_of(made)
    pixels, grid, keys = made.train_dataset.normalised(batch), tuple(batch["grid"]), batch["view_keys"]
    (whole,) = made.teach(pixels, grid, keys)
    other = [keys[0], keys[1], bytes(16), bytes(16)]
    (mixed,) = made.teach(-pixels, grid, other)  # so that what is computed can be told from what is kept
    assert torch.equal(mixed.patches[:2], whole.patches[:2])
    assert torch.equal(mixed.patches[2], made.teach(-pixels, grid)[0].patches[2].to(torch.bfloat16).float())
    assert torch.equal(mixed.patches[3], mixed.patches[2])  # one view has one value, also twice in a batch


CHANGES: dict[str, dict[str, Any]] = {
    "view": {"view": 1},
    "seed": {"seed": 1},
    "size": {"size": 2 * SIZE},
    "teacher": {"teacher": ENCODERS["dinov2"] | {"layer_norm_eps": 1e-5}},
    "weights": {"nudge": 1e-6},
    "geometry": {"geometry": "resample_patch_embed"},
}


def keys_and_identity(
    view: int = 0,
    seed: int = 0,
    size: int = SIZE,
    teacher: dict[str, Any] = ENCODERS["dinov2"],
    nudge: float = 0.0,
    geometry: str = "native",
) -> tuple[set[bytes], str]:
    set_seed(1)
    teacher = GKDTeacher(teacher, geometry=geometry)
    next(iter(teacher.encoder.parameters())).data.flatten()[0] += nudge
    samples = iter(stream(views=2, seed=seed, size=size).shard(1, 0, 1, start=view * ROWS))
    keys = {
        view_keys(sample["pixel_values"][None], [sample["erasing"]], (4, 4))[0]
        for sample in (next(samples) for _ in range(ROWS))
    }
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in STATISTICS)
    args = GKDDistillationArguments("unused", use_cpu=True, max_steps=1)
    return keys, json.dumps(teacher_identity(teacher, args, mean, std), sort_keys=True)


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_never_taken_from_the_cache(change: str) -> None:
    keys, identity = keys_and_identity()
    assert keys_and_identity() == (keys, identity)
    others, other_identity = keys_and_identity(**CHANGES[change])
    assert other_identity != identity or not keys & others
    assert (other_identity != identity) == (change in ("teacher", "weights", "geometry"))


def test_the_training_itself_is_part_of_the_teachers_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in STATISTICS)
    teacher = GKDTeacher(ENCODERS["dinov2"])
    args = GKDDistillationArguments("unused", use_cpu=True, max_steps=1)
    own = teacher_identity(teacher, args, mean, std)
    assert teacher_identity(teacher, args, mean + 0.01, std) != own
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "0.1")
        assert teacher_identity(teacher, args, mean, std) != own
    for changed in ({"bf16": True}, {"torch_compile": True}, {"tf32": True}):
        other = replace(args)
        other.__dict__.update(changed)
        assert teacher_identity(teacher, other, mean, std) != own
    assert own["attention"] in ("sdpa", "eager")
    teacher.encoder.set_attn_implementation("eager" if own["attention"] == "sdpa" else "sdpa")
    assert teacher_identity(teacher, args, mean, std) != own


def test_a_resumed_training_gives_the_numbers_of_an_uninterrupted_one(tmp_path: Path) -> None:
    settings = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2}
    whole = trainer(tmp_path / "whole", tmp_path / "cache_of_whole", **settings)
    whole.train()
    broken = trainer(tmp_path / "broken", tmp_path / "cache", **settings)
    broken.add_callback(StopAt(3))  # the last checkpoint is of step 2; what came after is in no shard
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(tmp_path / "broken", tmp_path / "cache", **settings)
    (store,) = (each.store for each in resumed._teaching.caches)
    assert len(store) == 2 * BATCH
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_equal(weights(resumed), weights(whole))


def test_a_damaged_shard_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path / "run", tmp_path / "cache")
    batch = batch_of(made)
    asked = (made.train_dataset.normalised(batch), tuple(batch["grid"]), batch["view_keys"])
    (whole,) = made.teach(*asked)
    made.cache.on_train_end()
    path = next((tmp_path / "cache").glob("*/*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        again = trainer(tmp_path / "again", tmp_path / "cache")
    assert f"{path} is damaged" in caplog.text
    assert torch.equal(again.teach(*asked)[0].patches, whole.patches)
    again.cache.on_train_end()
    assert torch.equal(
        never_asked(trainer(tmp_path / "third", tmp_path / "cache")).teach(*asked)[0].patches, whole.patches
    )


def test_tokens_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    cache = TeacherCache(TokenStore(tmp_path), width=8)
    given = EncoderOutput(torch.ones(2, 8), torch.ones(2, 4, 8), (2, 2))
    given.patches[1, 2, 3] = torch.inf
    taken = cache([b"a" * 16, b"b" * 16], (2, 2), torch.device("cpu"), lambda: given)
    assert torch.equal(taken.patches, given.patches)
    assert b"a" * 16 in cache.store
    assert b"b" * 16 not in cache.store


def raise_no_room(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse_to_write(*args: Any) -> None:
    raise InputError("the teacher cache cannot be written (Read-only file system)")


@pytest.mark.parametrize("shard_bytes", [1, token_store.SHARD_BYTES], ids=["at each view", "at the checkpoint"])
def test_a_full_disk_costs_the_cache_and_not_the_training(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer(tmp_path / "whole", tmp_path / "other")
    whole.train()
    made = trainer(tmp_path / "run", tmp_path / "cache", save_steps=2)
    made._teaching.caches[0].store.shard_bytes = shard_bytes
    monkeypatch.setattr(token_store, "save_file", raise_no_room)
    with caplog.at_level(logging.WARNING):
        made.train()
    told = [record.getMessage() for record in caplog.records if "teacher cache" in record.getMessage()]
    assert len(told) == 1
    assert "No space left on device" in told[0] and "goes on and keeps no more" in told[0]
    assert "\n" not in told[0] and str(tmp_path / "cache") in told[0]
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert losses(made) == pytest.approx(losses(whole), rel=2**-8)
    (folder,) = (tmp_path / "cache").iterdir()
    assert [path.name for path in folder.iterdir()] == ["identity.json"]
    assert len(made._teaching.caches[0].store) == 0


def test_a_cache_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cold = trainer(tmp_path / "cold", tmp_path / "cache")
    cold.train()
    (folder,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(TokenStore, "_put", refuse_to_write)
    with caplog.at_level(logging.WARNING):
        warm = never_asked(trainer(tmp_path / "warm", tmp_path / "cache"))
        warm.train()
    assert losses(warm) == losses(cold)
    assert "teacher cache" not in caplog.text  # it holds everything: nothing had to be written
    (folder / "identity.json").unlink()
    with caplog.at_level(logging.WARNING):
        again = trainer(tmp_path / "again", tmp_path / "cache")
    assert caplog.text.count("Read-only file system") == 1
    assert not again._teaching.caches[0].keeping
    assert len(again._teaching.caches[0].store) == ROWS


def test_a_full_disk_keeps_tokens_of_the_batch_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TeacherCache(TokenStore(tmp_path, shard_bytes=1), width=8)
    kept = EncoderOutput(torch.zeros(1, 8), torch.zeros(1, 4, 8), (2, 2))
    cache([b"k" * 16], (2, 2), torch.device("cpu"), lambda: kept)
    monkeypatch.setattr(token_store, "save_file", raise_no_room)
    given = EncoderOutput(torch.ones(2, 8), torch.ones(2, 4, 8), (2, 2))
    for _ in range(2):
        taken = cache([b"k" * 16, b"n" * 16], (2, 2), torch.device("cpu"), lambda: given)
        assert torch.equal(taken.patches, torch.cat([kept.patches, given.patches[:1]]))
    assert len(cache.store) == 1
    assert caplog.text.count("No space left on device") == 1


def test_what_a_cache_cannot_keep_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="keeps the teacher's tokens of fixed views, and this stream shows a new"):
        trainer(tmp_path / "run", tmp_path / "cache", data=stream(views=None))
    (tmp_path / "file").write_text("")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="the teacher cache '.*file.*' can neither be made nor read .Not a directory"):
        trainer(tmp_path / "run", tmp_path / "file")
    monkeypatch.setattr(GKDTeacher, "sharded", True)
    with pytest.raises(InputError, match="teacher_cache cannot keep the tokens of 'dinov2', which is shared out"):
        trainer(tmp_path / "run", tmp_path / "cache")
