"""One's own data from a folder of parquet shards that others made, and contact sheets of what is prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gkd_hf.data import preview
from gkd_hf.data.manifest import Manifest
from gkd_hf.data.prepare import prepare
from gkd_hf.data.preview import contact_file, prepared_sheet
from gkd_hf.data.shards import open_rows
from gkd_hf.errors import InputError

from .samples import encode, make_rows, row_image

MAGENTA = (255, 0, 255)


def settings(**others: object) -> dict:
    given = {"classes": ("left", "right"), "shard_rows": 4, "workers": 1, "progress": False}
    return given | others


def label(*values: int) -> bytes:
    return encode(np.tile(np.array(values, dtype=np.uint8), (8, 8 // len(values))))


@pytest.fixture
def foreign(write_folder: Callable[..., Path]) -> Path:
    """Ten rows, in groups and files of others, with ids 7 and 8."""
    return write_folder(make_rows(10, labels=dict.fromkeys(range(10), label(7, 8))), per_shard=3, name="foreign")


def test_foreign_shards_become_prepared_ones(foreign: Path, tmp_path: Path) -> None:
    given = settings(id_map={7: 1, 8: 0})
    manifest = prepare("custom:mine", foreign, tmp_path / "out", contact=tmp_path / "contact.png", **given)
    assert (manifest.splits["train"].rows, manifest.splits["train"].pixels) == (10, (320, 320))
    rows = list(open_rows(tmp_path / "out", "train"))
    assert [row["id"] for row in rows] == [f"row{number:03d}" for number in range(10)]
    assert [row["image"]["bytes"] for row in rows] == [row_image(number) for number in range(10)]
    assert rows[0]["image"]["path"] == "row000.png"
    assert PIL.Image.open(tmp_path / "contact.png").width > 500
    prepare("custom:mine", foreign, tmp_path / "two", **given | {"workers": 2})
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert prepare("custom:mine", foreign, tmp_path / "out", **given) == manifest


def test_bad_rows_of_foreign_shards_are_left_out(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    labels = {1: label(0, 9), 2: b"a text", 3: encode(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), 4: None}
    rows = [{**row, "id": "the same"} for row in make_rows(20, images={0: row_image(0)[:40]}, labels=labels)]
    manifest = prepare("custom", write_folder(rows), tmp_path / "out", **settings(max_bad=0.3))
    train = manifest.splits["train"]
    assert [entry["id"] for entry in train.left_out] == [f"{number:08d}" for number in range(5)]  # ids are not unique
    reasons = [entry["reason"].split(" (")[0] for entry in train.left_out[1:]]
    assert reasons == [
        "label: values outside the map",
        "label: not an image",
        "label: colours in place of ids",
        "label: missing",
    ]


def refusal(call: Callable, *arguments: object, **given: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **given)
    return str(caught.value)


def test_other_shards_than_before_are_refused(
    foreign: Path, write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    prepare("custom", foreign, tmp_path / "out", **settings(id_map={7: 1, 8: 0}))
    rows = make_rows(10, labels=dict.fromkeys(range(10), label(7, 8, 8, 8)))
    other = write_folder(rows, per_shard=3, name="other")
    told = refusal(prepare, "custom", other, tmp_path / "out", **settings(id_map={7: 1, 8: 0}))
    assert "raw files of other names or sizes" in told
    lonely = write_folder([{"image": row_image(0), "id": "a"}], name="lonely")
    assert "column 'label' is missing" in refusal(prepare, "custom", lonely, tmp_path / "no", **settings())
    told = refusal(prepare, "custom", foreign, tmp_path / "no", **settings(splits=["test"]))
    assert "no parquet shards of split 'test'" in told


def test_a_sheet_of_prepared_data_needs_no_other_word(foreign: Path, tmp_path: Path) -> None:
    prepare("custom:mine", foreign, tmp_path / "out", **settings(id_map={7: 1, 8: 0}))
    sheet = prepared_sheet(tmp_path / "out")
    named = prepared_sheet(foreign, "custom:mine", classes=["left", "right"], id_map={7: 1, 8: 0})
    wrong = prepared_sheet(foreign, "custom", classes=["left", "right"])
    assert not _has(sheet, MAGENTA) and not _has(named, MAGENTA) and _has(wrong, MAGENTA)
    assert "name it" in refusal(prepared_sheet, foreign)
    assert "classes of your own data" in refusal(prepared_sheet, foreign, "custom")


def test_the_colours_are_the_domains_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(preview, "contact_sheet", lambda *given, **others: seen.append((*given, others)))
    for name, classes in (("camvid_dusk", None), ("imagenet", None), ("cityscapes", ("a", "b"))):
        manifest = Manifest(name, classes and "train_ids", classes, {"other": None}, {})
        monkeypatch.setattr(preview, "find_manifest", lambda location, revision, found=manifest: found)
        prepared_sheet("org/name", revision="v1")
        monkeypatch.setattr(preview, "find_manifest", lambda location, revision: None)
        prepared_sheet("org/name", name)
    maps = [(ids and ids.name, space and space.name, others["split"]) for _, ids, space, _, others in seen]
    assert maps == [
        (None, None, "other"),
        ("identity", "camvid", "test"),
        (None, None, "other"),
        (None, None, "train"),
        ("identity", "custom", "other"),
        ("cityscapes", "cityscapes", "train"),
    ]
    assert seen[0][-1] == {"split": "other", "title": "camvid_dusk", "revision": "v1"}


def test_where_a_sheet_goes(tmp_path: Path) -> None:
    assert contact_file(tmp_path, "", made=True) == tmp_path / "contact.png"
    assert contact_file(tmp_path, "x.png", made=True) == Path("x.png")
    assert contact_file("org/name", "", made=False) == Path("contact.png")
    assert contact_file("data/mine", "", made=True) == Path("data/mine/contact.png")  # which might be a Hub id
    assert contact_file(tmp_path / "new/folder", None, made=True) == tmp_path / "new/folder/contact.png"
    told = refusal(preview.save_sheet, PIL.Image.new("RGB", (2, 2)), tmp_path / "none/contact.png")
    assert "cannot be written (No such file or directory)" in told


def _has(sheet: PIL.Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(sheet) == colour).all(-1).any())
