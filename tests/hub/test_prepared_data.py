"""Prepared data sets on the Hub: their labels are known to be train ids, and a contact sheet draws them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from huggingface_hub import constants

from gkd_hf.data.manifest import MANIFEST, Manifest, find_manifest
from gkd_hf.data.prepare import prepare
from gkd_hf.data.preview import prepared_sheet
from gkd_hf.data.shards import open_rows
from gkd_hf.errors import InputError
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.recipe_file import load_recipe
from tests.data.raw_trees import TREES
from tests.data.samples import encode, make_rows, row_image, write_shard

from .repos import Repo
from .server import LoopbackHub

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
Process = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub(online: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LoopbackHub:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", online.url)
    return online


def streets(hub: LoopbackHub, name: str, folder: Path) -> Repo:
    TREES["cityscapes"](folder / "raw")
    prepare("cityscapes", folder / "raw", folder / "out", workers=1, progress=False)
    return hub.add_dataset(name, folder / "out")


def test_the_manifest_at_the_pinned_revision_decides_the_label_map(hub: LoopbackHub, tmp_path: Path) -> None:
    repo = streets(hub, "org/pinned", tmp_path)
    prepared = repo.commits[-1].oid
    repo.add_commit("other labels", deleted=[MANIFEST])
    roots = {"imagenet": "org/pinned", "cityscapes": "org/pinned"}
    roots |= {f"acdc_{name}": "org/pinned" for name in ("night", "snow", "fog", "rain")}
    changes = [f"data.roots.{name}={root}" for name, root in roots.items()]
    recipe = load_recipe(RECIPES / "cityscapes_dinov2b_deits.yaml", changes)
    assert RecipeData(recipe).label_map("cityscapes").name == "cityscapes"
    recipe.data.revisions["cityscapes"] = prepared
    assert RecipeData(recipe).label_map("cityscapes").name == "identity"
    assert find_manifest("org/pinned", prepared).domain == "cityscapes" and find_manifest("org/pinned") is None
    recipe.data.revisions["cityscapes"] = "v9"
    with pytest.raises(InputError, match="no revision 'v9'"):
        RecipeData(recipe)
    recipe.data.revisions["cityscapes"] = prepared
    recipe.data.label_maps["cityscapes"] = "gtav"
    with pytest.raises(InputError, match="org/pinned holds train ids"):
        RecipeData(recipe)
    del recipe.data.revisions["cityscapes"]
    assert RecipeData(recipe).label_map("cityscapes").name == "gtav"


def test_other_classes_on_the_hub_are_refused_where_no_map_is_needed_too(hub: LoopbackHub, tmp_path: Path) -> None:
    repo = streets(hub, "org/night", tmp_path)
    hub.add_dataset("org/streets", tmp_path / "out")
    roots = {"imagenet": "org/streets", "cityscapes": "org/streets"}
    roots |= {f"acdc_{name}": "org/night" for name in ("night", "snow", "fog", "rain")}
    recipe = load_recipe(
        RECIPES / "cityscapes_dinov2b_deits.yaml", [f"data.roots.{name}={root}" for name, root in roots.items()]
    )
    assert RecipeData(recipe).label_map("acdc_night").name == "identity"
    manifest = Manifest.read(tmp_path / "out")
    permuted = replace(manifest, classes=manifest.classes[::-1])
    repo.add_commit("permuted", added={MANIFEST: permuted.to_json().encode()})
    recipe.data.revisions = {f"acdc_{name}": repo.commits[-1].oid for name in ("night", "snow", "fog", "rain")}
    with pytest.raises(InputError, match="the labels in org/night were prepared for the classes bicycle, motorcycle"):
        RecipeData(recipe)


def test_a_sheet_of_a_hub_id_needs_no_other_word(hub: LoopbackHub, tmp_path: Path) -> None:
    streets(hub, "org/sheet", tmp_path)
    assert (np.asarray(prepared_sheet("org/sheet")) == (128, 64, 128)).all(-1).any()  # the legend's road
    assert prepared_sheet("org/sheet", split="validation").size == prepared_sheet("org/sheet").size


def test_rows_of_the_hub_become_a_prepared_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    label = encode(np.tile(np.array([7, 8], dtype=np.uint8), (8, 4)))
    rows = make_rows(10, labels=dict.fromkeys(range(10), label))
    files = {}
    for split, number, part in (("train", 0, rows[:4]), ("train", 1, rows[4:8]), ("validation", 0, rows[8:])):
        write_shard(tmp_path / "shard.parquet", part)
        shards = 2 if split == "train" else 1
        files[f"data/{split}-{number:05d}-of-{shards:05d}.parquet"] = (tmp_path / "shard.parquet").read_bytes()
    hub.add_dataset("org/foreign", files)
    given = {"classes": ("left", "right"), "shard_rows": 3, "progress": False}
    for workers in (1, 2):
        manifest = prepare(
            "custom", "org/foreign", tmp_path / str(workers), id_map={7: 1, 8: 0}, workers=workers,
            contact=tmp_path / "contact.png", **given,
        )  # fmt: skip
    assert {name: split.rows for name, split in manifest.splits.items()} == {"train": 8, "validation": 2}
    found = list(open_rows(tmp_path / "1", "train"))
    assert [row["image"]["bytes"] for row in found] == [row_image(number) for number in range(8)]
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    assert PIL.Image.open(tmp_path / "contact.png").width > 500
    with pytest.raises(InputError, match=r"8 of its 8 samples .* outside the map \(7, 8"):
        prepare("custom", "org/foreign", tmp_path / "wrong", **given)
    hub.add_dataset("org/pictures", {"train/a.png": row_image(0)})
    with pytest.raises(InputError, match="'org/pictures' is not stored as parquet on the Hub: download it"):
        prepare("custom", "org/pictures", tmp_path / "wrong", **given)
    repo = hub.repos["dataset", "org/foreign"]
    repo.add_commit("fewer", deleted=["data/validation-00000-of-00001.parquet"])
    first = repo.commits[0].oid
    assert prepare("custom", "org/foreign", tmp_path / "3", revision=first, id_map={7: 1, 8: 0}, **given) == manifest
