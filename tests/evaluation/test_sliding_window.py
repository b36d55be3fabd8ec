"""Sliding windows: where they stand, that they average, and that batching and image size change nothing else."""

import pytest
import torch
from torch import nn

from gkd_hf.errors import InputError
from gkd_hf.evaluation.sliding_window import predict_labels, sliding_window_logits, window_starts


def pointwise(pixels):
    """Two scores that depend on their own pixel alone, so windows must not change them at all."""
    return torch.stack([pixels[:, 0] * 2, pixels[:, 1] - pixels[:, 2]], dim=1)


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
