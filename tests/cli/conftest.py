"""The command line called in this process, and a recipe of tiny data and models to spoil."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from gkd_hf.models.loading import load_encoder
from tests.tiny import ENCODERS

ROOT = Path(__file__).parents[2]
CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SIZE = 32


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def good_rows(count: int, classes: int = 3) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": png(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)),
            "label": png(rng.integers(0, classes, (SIZE, SIZE), dtype=np.uint8)),
            "id": f"row{index}",
        }
        for index in range(count)
    ]


def write_shard(folder: Path, split: str, rows: list[dict], columns: Iterable[str] = ("image", "label", "id")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for column in columns:
        if column == "id":
            arrays[column] = pa.array([row["id"] for row in rows], pa.string())
        else:
            arrays[column] = pa.array([{"bytes": row[column], "path": None} for row in rows], CELL)
    pq.write_table(pa.table(arrays), folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="session")
def run_gkd() -> ModuleType:
    """scripts/run_gkd.py as a module."""
    spec = importlib.util.spec_from_file_location("run_gkd", ROOT / "scripts" / "run_gkd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A ViT teacher with 8-pixel patches, as a folder."""
    load_encoder(ENCODERS["vit"])[0].save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path) -> Path:
    """A recipe that runs: three classes, 24 training and 4 test images."""
    write_shard(tmp_path / "data", "train", good_rows(24))
    write_shard(tmp_path / "data", "test", good_rows(4))
    stage = {"data": "custom", "image_size": SIZE, "batch_size": 4, "max_steps": 2, "workers": 0, "logging_steps": 1}
    content = {
        "student": {"encoder": dict(ENCODERS["resnet"])},
        "teacher": {"name": str(teacher)},
        "stages": {
            "domain_agnostic": dict(stage),
            "task": stage | {"decode_head": "linear", "window": SIZE, "stride": SIZE},
        },
        "data": {"roots": {"custom": str(tmp_path / "data")}, "classes": ["a", "b", "c"]},
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def refused(run_gkd: ModuleType, recipe: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the recipe with overrides; assert the exit code, 2, and one line; return that line."""

    def run(*overrides: str, path: Path | None = None, expected: int = 2) -> str:
        code = run_gkd.main([str(path or recipe), *overrides])
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert code == expected
        assert len(errors) == 1, errors
        return errors[0][errors[0].index("error:") :]

    return run
