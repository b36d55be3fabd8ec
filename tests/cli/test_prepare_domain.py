"""scripts/prepare_domain.py: prepare, verify and push from the command line, and what a full disk does."""

from __future__ import annotations

import errno
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from huggingface_hub import constants

from gkd_hf.data import preview
from gkd_hf.data.custom_layout import read_classes, read_id_map
from gkd_hf.data.prepare import prepare, verify
from gkd_hf.data.shards import count_rows, open_rows
from gkd_hf.errors import InputError
from gkd_hf.hub import upload
from tests.hub.server import LoopbackHub

from .conftest import png

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "prepare_domain.py"
CUSTOM = ("--classes", "left,right", "--id-map", "0:255,7:0,8:1", "--shard-rows", "2", "--workers", "1", "--quiet")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six pairs of 128-pixel pictures that take some 50 kB each."""
    rng = np.random.default_rng(0)
    for number in range(6):
        for kind, values in (("images", (0, 256, (128, 128, 3))), ("masks", (7, 9, (128, 128)))):
            path = tmp_path / "raw" / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(rng.integers(*values, dtype=np.uint8)))
    return tmp_path / "raw"


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("prepare_domain_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub that this process's client uses, with a token that may write; its client does not wait."""
    with LoopbackHub() as running:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", running.url)
        monkeypatch.setattr(
            datasets.config, "HUB_DATASETS_URL", running.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        )
        monkeypatch.setenv("HF_TOKEN", running.write_token)
        monkeypatch.setattr(upload.time, "sleep", lambda seconds: None)
        yield running


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "contact.png"}


def test_prepare_verify_and_be_told(
    main: Callable[..., int], raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main("custom", "--root", raw, "--out", out, *CUSTOM, "--verify") == 0
    assert "6 train images in 3 files" in capsys.readouterr().out
    (out / "train-00001-of-00003.parquet").write_bytes(b"x")
    for arguments, told in (
        (("--verify", "--out", out, "--quiet"), "train-00001-of-00003.parquet has 1 bytes"),
        (("--out", out), "nothing to do"),
        (("--root", raw, "--out", out), "no domain"),
        (("custom", "--root", raw, "--out", out, "--id-map", "7"), "id map 7: give"),
        (("cityscape", "--root", raw, "--out", out), "did you mean 'cityscapes'?"),
        (("custom", "--root", raw / "none", "--out", out, "--classes", "a"), "images/ and masks/"),
    ):
        assert main(*arguments) == 2
        said = capsys.readouterr().err
        assert told in said and said.startswith("error: ") and said.count("\n") == 1


def test_push_and_load_back(main: Callable[..., int], raw: Path, tmp_path: Path, hub: LoopbackHub) -> None:
    out = tmp_path / "out"
    hub.inject(503, method="POST", path=r"/commit/")
    for _ in range(2):  # the second time nothing changed
        assert main("custom", "--root", raw, "--out", out, *CUSTOM, "--push-to-hub", "org/mine") == 0
    repo = hub.repos["dataset", "org/mine"]
    assert repo.private and [commit.summary.startswith("Upload") for commit in repo.commits].count(True) == 1
    pushed = repo.files()
    assert {name: pushed[name] for name in files(out)} == files(out)
    assert count_rows("org/mine", "train") == 6
    for rows in (
        datasets.load_dataset("org/mine", split="train", cache_dir=str(tmp_path / "cache")),
        datasets.load_dataset("org/mine", split="train", streaming=True),
    ):
        found = list(rows)
        assert [row["id"] for row in found] == [str(number) for number in range(6)]
        assert found[0]["image"].size == (128, 128) and set(np.unique(found[0]["label"])) == {0, 1}
    cells = [row["image"]["bytes"] for row in open_rows("org/mine", "train")]
    assert cells == [(raw / "images" / f"{number}.png").read_bytes() for number in range(6)]
    # Other shards take the place of the old ones; another's data set is left alone.
    shutil.rmtree(out)
    assert main("custom", "--root", raw, "--out", out, *CUSTOM[:4], "--quiet", "--push-to-hub", "org/mine") == 0
    assert sorted(name for name in repo.files() if name.endswith("parquet")) == ["train-00000-of-00001.parquet"]
    hub.add_dataset("org/other", {"data/train-00000-of-00001.parquet": b"x"})
    assert main("--out", out, "--push-to-hub", "org/other", "--quiet") == 2


def test_a_contact_sheet_comes_first_and_shows_a_wrong_map(
    main: Callable[..., int], raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    magenta, out = (255, 0, 255), tmp_path / "out"

    def sheet(path: Path) -> np.ndarray:
        return np.asarray(PIL.Image.open(path))

    wrong = ("custom", "--root", raw, "--out", out, "--classes", "left,right", "--quiet")
    assert main(*wrong) == 2
    said = capsys.readouterr().err
    assert (
        "6 × label: values outside the map" in said
        and f"(look at {out / 'contact.png'})" in said
        and said.count("\n") == 1
    )
    assert [path.name for path in out.iterdir()] == ["contact.png"]
    assert (sheet(out / "contact.png") == magenta).all(-1).sum() > 50_000
    assert main("custom", "--root", raw, "--out", out, *CUSTOM) == 0
    assert f"{out / 'contact.png'}: look at it" in capsys.readouterr().out
    assert not (sheet(out / "contact.png") == magenta).all(-1).any()
    # Of what is prepared, and of the shards of others, wherever they are.
    (out / "contact.png").unlink()
    assert main("--contact", "--out", out) == 0 and (out / "contact.png").exists()
    (out / "manifest.json").unlink()
    named = ("--contact", tmp_path / "two.png", "--out", out, "--classes", "left,right")
    assert main(*named) == 2 and "name it" in capsys.readouterr().err
    assert main("custom", *named) == 0
    assert sheet(tmp_path / "two.png").shape == sheet(out / "contact.png").shape
    assert main("custom", "--contact", tmp_path / "no" / "two.png", *named[2:]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_classes_and_maps_are_read_from_files_too(tmp_path: Path) -> None:
    many = [f"class number {number}" for number in range(150)]
    assert read_classes(",".join(many)) == many  # longer than any file's name
    (tmp_path / "classes.txt").write_text("\n".join(many) + "\n\n")
    assert read_classes(str(tmp_path / "classes.txt")) == many and read_classes(None) is None
    (tmp_path / "map.json").write_text('{"7": 0, "0": 255}')
    assert read_id_map(str(tmp_path / "map.json")) == read_id_map("7:0,0:255") == {7: 0, 0: 255}
    assert read_id_map(",".join(f"{number}:0" for number in range(200))) == dict.fromkeys(range(200), 0)
    (tmp_path / "map.json").write_bytes(b"\xff")
    for wrong in ("7", "7:a", str(tmp_path / "map.json")):
        with pytest.raises(InputError):
            read_id_map(wrong)


def test_missing_files_marks_and_repeated_ids(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfroad\nsky\n")
    assert read_classes(str(tmp_path / "classes.txt")) == ["road", "sky"]
    with pytest.raises(InputError, match="there is no file '.*none.txt'"):
        read_classes(str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="there is no file 'map.json'"):
        read_id_map("map.json")
    map_file = tmp_path / "map.json"
    for text in ('{"7": 0, "8": 1, "7": 1}', "7:0,8:1,7:1"):
        map_file.write_text(text)
        with pytest.raises(InputError, match="stored id 7 is listed twice"):
            read_id_map(str(map_file) if text.startswith("{") else text)
    for text in ('{"7": 0.9}', '{"7": true}', '{"7": "0"}', "[7, 8]", "3", '{"7": {"8": 1}}'):
        map_file.write_text(text)
        with pytest.raises(InputError, match="give stored:train ids"):
            read_id_map(str(map_file))


def test_a_full_disk_under_the_contact_sheet_asks_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preview, "whole_file", full)
    with pytest.raises(InputError, match="No space left on device.: make room and run the same command again"):
        preview.save_sheet(PIL.Image.new("RGB", (4, 4)), tmp_path / "contact.png")


def test_shards_are_not_written_among_the_images(
    main: Callable[..., int], raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "images" / "folder.png").mkdir()  # only files are images
    for out in (raw / "images", raw / "images" / "out", raw / "masks" / ".." / "images"):
        assert main("custom", "--root", raw, "--out", out, *CUSTOM) == 2
        assert "choose one outside of the raw data" in capsys.readouterr().err
    assert main("custom", "--root", raw, "--out", raw / "out", *CUSTOM) == 0


def test_bad_samples_are_told(
    main: Callable[..., int], raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "images" / "3.png").write_bytes(b"")
    assert main("custom", "--root", raw, "--out", tmp_path / "out", *CUSTOM) == 2
    said = capsys.readouterr().err
    assert "only 1 % may be left out: 1 × image: zero bytes; namely 3 [" in said and said.count("\n") == 1
    assert main("custom", "--root", raw, "--out", tmp_path / "out", *CUSTOM, "--max-bad", "0.2") == 0
    told = "5 train images in 3 files; bad samples left out, see manifest.json: 1 train"
    assert told in capsys.readouterr().out
    assert "1 × image: zero bytes" in (tmp_path / "out" / "README.md").read_text()


FULL_DISK = """
import importlib.util, os, shutil, subprocess, sys
script, out, kept, *arguments = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", out], check=True)
spec = importlib.util.spec_from_file_location("prepare_domain_script", script)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("code", module.main(arguments), *sorted(os.listdir(out)))
subprocess.run(["mount", "-o", "remount,size=8m", out], check=True)
print("code", module.main(arguments))
shutil.copytree(out, kept)
"""


def test_a_full_disk_is_one_line_and_goes_on(raw: Path, tmp_path: Path) -> None:
    allowed = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(allowed, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", sys.executable, "-c", FULL_DISK, SCRIPT, small, kept]
        + ["custom", "--root", raw, "--out", small, "--contact", tmp_path / "contact.png", *CUSTOM],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    errors = done.stderr.splitlines()
    assert len(errors) == 1 and "is full" in errors[0] and "2 of 3 shards are finished" in errors[0], done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert lines == ["code 2 train-00000-of-00003.parquet train-00001-of-00003.parquet", "code 0"]
    prepare("custom", raw, tmp_path / "whole", classes=["left", "right"], id_map={0: 255, 7: 0, 8: 1}, shard_rows=2,
            workers=1, progress=False)  # fmt: skip
    assert files(kept) == files(tmp_path / "whole") and verify(kept) == []
