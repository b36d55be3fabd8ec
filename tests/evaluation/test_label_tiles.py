"""Labels by tiles are those of resizing everything; only classes that can win are resized; what cannot be is left."""

import pytest
import torch
from torch.nn.functional import interpolate

from gkd_hf.errors import InputError
from gkd_hf.evaluation import label_tiles, sliding_window
from gkd_hf.evaluation.label_tiles import SIDE, WindowScores, labels_by_tiles
from gkd_hf.evaluation.sliding_window import best_class, predict_each, resize, window_starts


def blobs(height, width, classes=7, seed=0):
    """Smooth scores 1×C×height×width, as of a segmenter that sees objects."""
    few = torch.randn(1, classes, 3, 4, generator=torch.Generator().manual_seed(seed))
    return interpolate(few, (height, width), mode="bicubic")


def windows_of(coarse, size, side, stride, seed=0):
    """Windows C×h×w cut out of C×H/4×W/4 and made to differ where they overlap, and their average C×H×W."""
    windows, total, hits = [], torch.zeros(len(coarse), *size), torch.zeros(size)
    generator = torch.Generator().manual_seed(seed)
    for top in window_starts(size[0], side, stride):
        for left in window_starts(size[1], side, stride):
            part = coarse[:, top // 4 : (top + side) // 4, left // 4 : (left + side) // 4]
            part = part + 0.02 * torch.randn(part.shape, generator=generator)
            windows.append(WindowScores(part, slice(top, top + side), slice(left, left + side)))
            total[:, top : top + side, left : left + side] += resize(part[None], (side, side))[0]
            hits[top : top + side, left : left + side] += 1
    return windows, total / hits


@pytest.mark.parametrize("label_size", [(96, 160), (192, 320), (101, 333), (96, 320), (200, 160), (97, 161)], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_labels_are_those_of_resizing_everything(monkeypatch, classes, label_size):
    windows, averaged = windows_of(blobs(24, 40, classes)[0], (96, 160), 64, 44)
    monkeypatch.setattr(label_tiles, "_WORTH", 2)  # so small an image has nearly as many boundaries as tiles
    for at_once in (5, 4096):
        monkeypatch.setattr(label_tiles, "_AT_ONCE", at_once)
        labels = labels_by_tiles(averaged, windows, label_size, torch.uint8)
        assert labels.dtype == torch.uint8 and torch.equal(labels.long(), best_class(averaged, label_size))
    assert len(labels.unique()) >= min(classes, 4)


def test_of_equal_classes_the_first_is_best_everywhere(monkeypatch):
    monkeypatch.setattr(label_tiles, "_WORTH", 2)
    # Steps of a quarter are exact: there are as many ties as there can be.
    for coarse in (torch.zeros(5, 24, 40), (4 * blobs(24, 40, 5)[0]).round() / 4):
        windows = [WindowScores(coarse, slice(0, 96), slice(0, 160))]
        averaged = resize(coarse[None], (96, 160))[0]
        best = averaged.max(0)
        assert (averaged == best.values).sum(0).gt(1).any()
        assert torch.equal(labels_by_tiles(averaged, windows, (96, 160), torch.int64), best.indices)
        labels = labels_by_tiles(averaged, windows, (192, 320), torch.int64)
        assert torch.equal(labels, best_class(averaged, (192, 320)))


def test_only_classes_that_can_win_are_resized(monkeypatch):
    coarse = blobs(64, 128, 19)[0]
    windows = [WindowScores(coarse, slice(0, 256), slice(0, 512))]
    averaged, resized, plain = resize(coarse[None], (256, 512))[0], [], label_tiles._resized
    monkeypatch.setattr(label_tiles, "_resized", lambda *given: resized.append(given[3].numel()) or plain(*given))
    labels = labels_by_tiles(averaged, windows, (512, 1024), torch.int64)
    assert torch.equal(labels, best_class(averaged, (512, 1024))) and len(labels.unique()) > 5
    assert 0 < sum(resized) * SIDE**2 < 0.1 * 19 * labels.numel()


@pytest.mark.parametrize("place", [0, -1], ids=["first window", "last window"])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
def test_scores_that_are_not_finite_or_whose_sum_is_not_are_left_to_resizing_everything(strange, place):
    windows, averaged = windows_of(blobs(24, 40)[0], (96, 160), 64, 44)
    assert len(windows) > 1
    windows[place].scores[3, 5, 6] = strange
    assert labels_by_tiles(averaged, windows, (192, 320), torch.int64) is None


def test_noise_and_smaller_labels_are_left_to_resizing_everything():
    coarse = torch.randn(7, 24, 40, generator=torch.Generator().manual_seed(0))
    windows = [WindowScores(coarse, slice(0, 96), slice(0, 160))]
    assert labels_by_tiles(resize(coarse[None], (96, 160))[0], windows, (192, 320), torch.int64) is None
    few = [WindowScores(torch.randn(50, 8, 8), slice(0, 32), slice(0, 32))]  # of which every tile is looked at
    assert labels_by_tiles(resize(few[0].scores[None], (32, 32))[0], few, (64, 64), torch.int64) is None
    windows = [WindowScores(blobs(24, 40, 1)[0], slice(0, 96), slice(0, 160))]
    averaged = resize(windows[0].scores[None], (96, 160))[0]
    assert labels_by_tiles(averaged, windows, (192, 320), torch.int64) is not None
    assert labels_by_tiles(averaged, windows, (95, 320), torch.int64) is None


@pytest.mark.parametrize("kind", ["blobs", "noise", "nan"])
@pytest.mark.parametrize("shape", [(64, 150), (50, 90)], ids=str)  # the second is padded to the window
def test_predictions_do_not_depend_on_the_way(monkeypatch, shape, kind):
    if kind == "noise":
        monkeypatch.setattr(label_tiles, "_WORTH", 0)
    tiled = []
    monkeypatch.setattr(
        sliding_window, "labels_by_tiles", lambda *given: tiled.append(given) or labels_by_tiles(*given)
    )

    def forward(crops):
        scores = torch.cat([blobs(16, 16, seed=int(crop.sum() * 1000)) for crop in crops])
        if kind == "nan":
            scores[-1, 4, 3, 2] = torch.nan  # of the batch's last window
        return scores.to(memory_format=torch.channels_last)  # as convolutions on a CPU return them

    pixels = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    options = {"window": 64, "stride": 43, "batch_size": 3}
    sizes = [(2 * shape[0], 2 * shape[1]), (130, 301)]
    ours = list(predict_each(forward, pixels, sizes, dtype=torch.uint8, **options))
    assert len(tiled) == 2
    monkeypatch.setattr(sliding_window, "_COARSE", 0)
    whole = list(predict_each(forward, pixels, sizes, **options))
    assert len(tiled) == 2 and [labels.dtype for labels in (ours[0], whole[0])] == [torch.uint8, torch.int64]
    for labels, expected, size in zip(ours, whole, sizes, strict=True):
        assert labels.shape == size and torch.equal(labels.long(), expected)


def test_classes_that_the_type_does_not_hold_are_refused():
    with pytest.raises(InputError, match="torch.uint8 does not hold the labels of 257 classes"):
        list(
            predict_each(lambda crops: torch.zeros(1, 257, 2, 2), torch.zeros(1, 3, 8, 8), [(8, 8)], dtype=torch.uint8)
        )
