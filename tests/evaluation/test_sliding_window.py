"""Sliding windows: where they stand, that they average, and that batching and image size change nothing else."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gkd_hf.errors import InputError
from gkd_hf.evaluation import sliding_window
from gkd_hf.evaluation.sliding_window import (
    best_class,
    predict_each,
    predict_labels,
    resize,
    sliding_window_logits,
    window_starts,
)
from gkd_hf.training.live_memory import LiveMemory


def pointwise(pixels):
    """Two scores that depend on their own pixel alone, so windows must not change them at all."""
    return torch.stack([pixels[:, 0] * 2, pixels[:, 1] - pixels[:, 2]], dim=1)


def assert_same_labels(labels, scores):
    """Equal to the argmax of C×H×W ``scores``, but where the two best are as near as a rounding error."""
    assert labels.dtype == torch.int64 and labels.shape == scores.shape[1:]
    best, predicted = scores.max(0).values, scores.gather(0, labels[None])[0]
    assert (best - predicted <= 1e-6 * scores.abs().max()).all()
    assert (labels == scores.argmax(0)).float().mean() > 0.999


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave back."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_iter(out) if isinstance(each, torch.Tensor)]
        self.numbers = max([self.numbers, *made])
        return out


def numbered_windows():
    """A forward whose score is the number of the window (0, 1, 2, …), and the sizes of the batches it saw."""
    sizes = []

    def forward(pixels):
        first = sum(sizes)
        sizes.append(len(pixels))
        number = torch.arange(first, first + len(pixels), dtype=torch.float32)
        return number[:, None, None, None].expand(-1, 1, *pixels.shape[2:])

    return forward, sizes


@pytest.mark.parametrize(
    ("size", "window", "stride", "starts"),
    [
        (512, 512, 341, [0]),
        (300, 512, 341, [0]),
        (513, 512, 341, [0, 1]),
        (853, 512, 341, [0, 341]),
        (854, 512, 341, [0, 341, 342]),
        (1024, 512, 341, [0, 341, 512]),
        (1280, 512, 341, [0, 341, 682, 768]),
        (10, 4, 4, [0, 4, 6]),
    ],
)
def test_windows_end_at_the_border(size, window, stride, starts):
    assert window_starts(size, window, stride) == starts


@pytest.mark.parametrize("shape", [(5, 5), (8, 8), (3, 11), (13, 4), (9, 17)])
def test_a_pointwise_model_is_unchanged_at_any_size(shape):
    pixels = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    logits = sliding_window_logits(pointwise, pixels, window=8, stride=5, batch_size=3)
    torch.testing.assert_close(logits, pointwise(pixels))


def test_overlaps_are_averaged():
    # Windows of 4 at 0 and 2 over 6 pixels score 0 and 1: the two shared pixels get one half.
    forward, _ = numbered_windows()
    logits = sliding_window_logits(forward, torch.zeros(1, 3, 4, 6), window=4, stride=2, batch_size=9)
    assert logits[0, 0, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_windows_go_in_batches_over_all_images():
    forward, sizes = numbered_windows()
    logits = sliding_window_logits(forward, torch.zeros(3, 3, 4, 8), window=4, stride=4, batch_size=4)
    assert sizes == [4, 2]
    assert logits[:, 0, 0].tolist() == [[i] * 4 + [i + 1] * 4 for i in (0, 2, 4)]


def test_the_result_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 3, stride=2, padding=1)  # sees the window's border, so windows do differ
    pixels = torch.randn(2, 3, 19, 30)
    one = sliding_window_logits(model, pixels, window=12, stride=7, batch_size=1)
    for batch_size in (2, 5, 100):
        torch.testing.assert_close(
            sliding_window_logits(model, pixels, window=12, stride=7, batch_size=batch_size), one
        )
    assert not one.requires_grad


def test_one_window_is_the_plain_forward():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 3, padding=1)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(sliding_window_logits(model, pixels, window=16, stride=9), model(pixels))


def test_a_small_image_is_padded_at_the_right_and_bottom():
    seen = []

    def forward(pixels):
        seen.append(pixels)
        return pixels[:, :1]

    pixels = torch.rand(1, 3, 3, 5) + 1
    logits = sliding_window_logits(forward, pixels, window=8, stride=5)
    assert seen[0].shape == (1, 3, 8, 8)
    assert torch.equal(seen[0][..., :3, :5], pixels)
    assert seen[0][..., 3:, :].eq(0).all() and seen[0][..., 5:].eq(0).all()
    assert torch.equal(logits, pixels[:, :1])


def test_coarse_and_half_precision_scores_are_resized_to_the_window():
    logits = sliding_window_logits(
        lambda pixels: torch.tensor([[[[0.0, 4.0]]]], dtype=torch.bfloat16),
        torch.zeros(1, 3, 4, 4),
        window=4,
        stride=4,
    )
    assert logits.dtype == torch.float32
    assert logits[0, 0, 3].tolist() == [0, 1, 3, 4]  # bilinear between the centres of two pixels, edges held


def test_labels_are_predicted_at_the_label_size():
    # Class 1 scores −1 and 3, class 0 always 0.1. At width 4 bilinear centres give class 1 −1, 0, 2, 3.
    pixels = torch.tensor([[-1.0, 3.0], [-1.0, 3.0]]).expand(1, 3, 2, 2)
    labels = predict_labels(lambda x: torch.stack([0.1 + 0 * x[:, 0], x[:, 0]], 1), pixels, (2, 4), window=2, stride=2)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1]]]


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"stride": 0}, {"window": 4, "stride": 5}, {"batch_size": 0}], ids=str
)
def test_impossible_windows_are_refused(options):
    with pytest.raises(InputError, match="stride at most the window"):
        sliding_window_logits(pointwise, torch.zeros(1, 3, 8, 8), **options)


def test_an_image_without_batch_axis_is_refused():
    with pytest.raises(InputError, match=r"shape \(3, 8, 8\).*B×3×H×W"):
        sliding_window_logits(pointwise, torch.zeros(3, 8, 8))


SIZES = [
    ((16, 24), (32, 48)),
    ((37, 51), (90, 77)),
    ((45, 31), (101, 97)),
    ((90, 77), (37, 51)),
    ((60, 80), (15, 20)),
    ((33, 40), (70, 40)),
    ((33, 40), (33, 90)),
    ((33, 40), (12, 90)),
    ((20, 30), (20, 30)),
    ((1, 1), (5, 9)),
    ((7, 5), (1, 1)),
]


@pytest.mark.parametrize("classes", [1, 2, 19])
@pytest.mark.parametrize(("source", "target"), SIZES, ids=str)
def test_the_best_class_by_tiles_is_that_of_all_scores(monkeypatch, classes, source, target):
    scores = torch.randn(classes, *source, generator=torch.Generator().manual_seed(0))
    whole = resize(scores[None], target)[0]
    # From single rows to all at once.
    for tile in (1, 3 * classes * target[1], sliding_window.TILE):
        monkeypatch.setattr(sliding_window, "TILE", tile)
        assert_same_labels(best_class(scores, target), whole)


def test_the_best_class_by_tiles_at_random_sizes(monkeypatch):
    monkeypatch.setattr(sliding_window, "TILE", 2000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        *source, height, width = torch.randint(2, 80, (4,), generator=generator).tolist()
        scores = torch.randn(5, *source, generator=generator)
        assert_same_labels(best_class(scores, (height, width)), resize(scores[None], (height, width))[0])


def test_of_equal_classes_the_first_is_best():
    scores = torch.zeros(3, 4, 4)
    scores[1:, :, 2:] = 1
    for size in ((4, 4), (8, 8), (3, 9)):
        assert best_class(scores, size)[:, 0].eq(0).all() and best_class(scores, size)[:, -1].eq(1).all()


@pytest.mark.parametrize("shape", [(9, 17), (20, 21), (12, 40)], ids=str)
def test_labels_are_the_argmax_of_the_averaged_scores(monkeypatch, shape):
    monkeypatch.setattr(sliding_window, "TILE", 500)
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    pixels = torch.randn(3, 3, *shape)
    options = {"window": 12, "stride": 7, "batch_size": 4}  # batches of windows that belong to two images
    logits = sliding_window_logits(model, pixels, **options)
    sizes = [(31, 50), (8, 9), shape]
    for image, labels in enumerate(predict_each(model, pixels, sizes, **options)):
        assert_same_labels(labels, resize(logits[image : image + 1], sizes[image])[0])
    together = predict_labels(model, pixels, (31, 50), **options)
    for labels, each in zip(together, logits, strict=True):
        assert_same_labels(labels, resize(each[None], (31, 50))[0])


def test_labels_do_not_depend_on_the_batch_of_images():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 3, padding=1)
    pixels = torch.randn(3, 3, 14, 20)
    options = {"window": 8, "stride": 5}
    together = predict_labels(model, pixels, (30, 40), batch_size=5, **options)
    for image, labels in zip(pixels, together, strict=True):
        alone = predict_labels(model, image[None], (30, 40), batch_size=1, **options)[0]
        assert (alone == labels).float().mean() > 0.999  # a convolution may round another batch otherwise


def test_all_scores_at_the_size_of_the_labels_are_never_in_memory():
    classes, label_size = 19, (384, 512)
    model = nn.Conv2d(3, classes, 1)
    pixels = torch.randn(2, 3, 96, 128)
    options = {"window": 64, "stride": 48, "batch_size": 2}
    with LargestTensor() as seen:
        predict_labels(model, pixels, label_size, **options)
    assert seen.numbers <= max(sliding_window.TILE, 2 * label_size[0] * label_size[1])
    with LargestTensor() as plain:
        resize(sliding_window_logits(model, pixels, **options), label_size).argmax(1)
    assert plain.numbers == 2 * classes * label_size[0] * label_size[1]


def test_memory_is_the_scores_of_one_image_and_one_batch_of_windows():
    torch.manual_seed(0)
    classes, batch_size, window = 7, 3, 64
    model = nn.Sequential(nn.Conv2d(3, 96, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(96, classes, 1))
    pixels = torch.randn(2, 3, 150, 210)

    @torch.no_grad()
    def peak(run):
        memory = LiveMemory(("all",))
        with memory, memory.phase("run", "all"):
            run()
        return max(memory.history["run"])[0]

    one_batch = peak(lambda: model(torch.stack([pixels[0, :, :window, :window]] * batch_size)))
    scores, first_labels = 4 * classes * 150 * 210, 8 * 150 * 210
    options = {"window": window, "stride": 40, "batch_size": batch_size}
    needed = peak(lambda: list(predict_each(model, pixels, [(150, 210)] * 2, **options)))
    assert scores < needed <= scores + one_batch + first_labels


def test_scores_that_cannot_be_resized_are_refused():
    with pytest.raises(InputError, match=r"shape \(2, 3, 8, 8\).*C×h×w"):
        best_class(torch.zeros(2, 3, 8, 8), (4, 4))
    with pytest.raises(InputError, match="cannot be resized to"):
        best_class(torch.zeros(3, 8, 8), (0, 4))


def test_every_image_needs_a_label_size():
    with pytest.raises(InputError, match="1 label sizes for 2 images"):
        next(predict_each(pointwise, torch.zeros(2, 3, 8, 8), [(8, 8)]))
