from __future__ import annotations

import pytest

from gkd_hf.data.label_maps import label_map
from gkd_hf.data.loader_benchmark import LoaderSettings, measure, tiled, write_pairs
from gkd_hf.errors import InputError

from .samples import make_rows


def test_every_kind_is_measured_and_compared_with_bare_decoding(write_folder, tmp_path, capsys):
    pairs = list(tiled(str(write_folder(make_rows(3))), "train", 4))
    assert [(image.shape, label.shape) for image, label in pairs] == [((512, 1024, 3), (512, 1024))] * 4
    write_pairs(iter(pairs), str(tmp_path))
    settings = LoaderSettings(pictures=4, images=4, rounds=1, workers=1, batch_size=2, stage1_size=32, stage2_size=32)
    found = measure(str(tmp_path), "train", label_map("identity", 2), settings)
    kinds = ["bare_decode", "stage1_crop_flip", "stage1_full", "stage2"]
    for key in ("images_per_second", "ratio", "cpu_ms", "cpu_ratio"):
        assert list(found[key]) == kinds
    assert found["ratio"]["bare_decode"] == 1 and all(rate > 0 for rate in found["images_per_second"].values())
    memory = found["resident_mib"]
    assert len(memory) == 3 and min(memory) > 0 and memory[2] < 1.5 * memory[0]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match="workers is 0"):
        LoaderSettings(workers=0)
    with pytest.raises(InputError, match="4 images are less than one batch of 16"):
        LoaderSettings(images=4)
