"""Segmentation of images of any size by a window of fixed size, as in the GKD paper's test protocol (2603.02554).

Overlapping windows are forwarded in batches and averaged; the encoder sees only the size that it was trained at.
Labels are taken from the averaged scores part by part: all classes at the label's size are never in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from gkd_hf.errors import InputError
from gkd_hf.evaluation.label_tiles import WindowScores, blended_places, labels_by_tiles

# Scores of one tile, all classes together: 4 MiB of float32, so that what is resized is still in the cache when the
# best class is looked for, and a GPU has enough to do in each call.
TILE = 2**20
# Windows' scores are kept as the model wrote them where those of an image are no more than this part of its average.
_COARSE = 1 / 6


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """First pixels of the ceil((size − window) / stride) + 1 windows along one axis; the last ends at the border."""
    count = math.ceil(max(size - window, 0) / stride) + 1
    return [min(index * stride, max(size - window, 0)) for index in range(count)]


@torch.no_grad()
def sliding_window_logits(
    forward: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    *,
    window: int = 512,
    stride: int = 341,
    batch_size: int = 4,
) -> torch.Tensor:
    """Average `forward`'s class scores over overlapping windows.

    Args:
        forward: maps n×3×window×window to n×C×h×w; h×w may be any size and is resized bilinearly to the window.
        pixel_values: B×3×H×W, normalised. An axis shorter than the window is padded with 0, the mean colour, at its
            right or bottom end, and the padding is cut from the result.
        window: side of the square window in pixels.
        stride: step between windows in pixels, at most `window`.
        batch_size: windows per call of `forward`, counted over all images; changes speed and memory, not the result.

    Returns:
        float32 B×C×H×W on the device of `pixel_values`.

    Raises:
        InputError: `pixel_values` is not B×3×H×W, or window, stride or batch size is out of range.
    """
    windows = _Windows(pixel_values, window, stride, batch_size)
    totals = None
    for image, rows, columns, score in windows.scores(forward):
        score = resize(score, (window, window))[0]
        if totals is None:
            totals = score.new_zeros(len(pixel_values), len(score), *windows.pixels.shape[2:])
        totals[image, :, rows, columns].add_(score)  # += would copy the sum onto itself
    return totals.div_(windows.hits())[:, :, : pixel_values.shape[2], : pixel_values.shape[3]]


@torch.no_grad()
def predict_labels(
    forward: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    label_size: tuple[int, int],
    *,
    window: int = 512,
    stride: int = 341,
    batch_size: int = 4,
) -> torch.Tensor:
    """Predict the class of every pixel at the label's own size (the scores are resized, then the best class taken).

    Beside what `forward` needs for one batch of windows, the averaged scores of one image are kept, on a CPU also what
    `forward` returned of its windows, and a tile is resized at a time.

    Args:
        label_size: (height, width) of the label maps, whatever the size of `pixel_values`.

    Returns:
        int64 B×label_height×label_width. The other arguments and the errors are `sliding_window_logits`'s.
    """
    sizes = [label_size] * len(pixel_values)
    options = {"window": window, "stride": stride, "batch_size": batch_size}
    return torch.stack(list(predict_each(forward, pixel_values, sizes, **options)))


@torch.no_grad()
def predict_each(
    forward: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    label_sizes: Sequence[tuple[int, int]],
    *,
    window: int = 512,
    stride: int = 341,
    batch_size: int = 4,
    dtype: torch.dtype = torch.int64,
) -> Iterator[torch.Tensor]:
    """Yield the labels of one image after the other, label_height×label_width each; see `predict_labels`.

    Args:
        label_sizes: (height, width) of each image's label map.
        dtype: integers that hold the classes: int64, or narrower ones, which are less to count.

    Raises:
        InputError: as `sliding_window_logits`; not one size per image; classes that ``dtype`` does not hold.
    """
    windows = _Windows(pixel_values, window, stride, batch_size)
    if len(label_sizes) != len(pixel_values):
        raise InputError(f"there are {len(label_sizes)} label sizes for {len(pixel_values)} images: give one for each")
    size = tuple(pixel_values.shape[2:])
    sums = _Averaged(windows)
    kept: list[WindowScores] = []
    for image, rows, columns, score in windows.scores(forward):
        if score.shape[1] - 1 > torch.iinfo(dtype).max:
            raise InputError(f"{dtype} does not hold the labels of {score.shape[1]} classes: give a wider one")
        sums.add(score, rows, columns)
        if windows.coarse(score) and tuple(label_sizes[image]) != size:  # else nothing is to be resized
            kept.append(WindowScores(score[0], rows, columns))
        del score  # of which the next one would otherwise be made beside
        if windows.is_last(rows, columns):
            averaged = sums.take()[:, : size[0], : size[1]]
            labels = labels_by_tiles(averaged, kept, label_sizes[image], dtype) if kept else None
            kept = []
            yield best_class(averaged, label_sizes[image], dtype) if labels is None else labels


def best_class(scores: torch.Tensor, size: tuple[int, int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return the best class of every pixel after resizing, as ``resize(scores, size).argmax(0)`` does, tile by tile.

    A tile is a band of rows: the rows of ``scores`` that it lies between are resized to its width, then blended. The
    coordinates are PyTorch's own for bilinear resizing with half-pixel centres. A resized score can differ from
    PyTorch's in its last bit, where that rounds in another order, so labels can differ where two classes are as near.

    Args:
        scores: C×h×w of any floating type; computed in float32. size: (height, width) of the labels.
        dtype: integers that hold the classes.

    Returns:
        height×width; of equal classes the first.

    Raises:
        InputError: scores that are not C×h×w, or a size below 1.
    """
    if scores.ndim != 3 or 0 in scores.shape or min(size) < 1:
        raise InputError(f"scores of shape {tuple(scores.shape)} cannot be resized to {tuple(size)}: give C×h×w")
    classes, source_height, source_width = scores.shape
    height, width = size
    if tuple(size) == (source_height, source_width):
        return scores.max(0).indices.to(dtype)
    above, below, weight = blended_places(source_height, height)
    weight = weight[:, None]
    blends = source_height != height
    firsts, lasts = above.tolist(), (below if blends else above).tolist()
    above, below, weight = (each.to(scores.device) for each in (above, below, weight))
    labels = torch.empty(height, width, dtype=dtype, device=scores.device)
    # A tile's rows of the source are resized too, and are more than its own where the labels are smaller.
    step = max(1, int(TILE / (classes * width * max(1, source_height / height))))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        first, end = firsts[top], lasts[rows.stop - 1] + 1
        # With the classes outermost, however they lie: PyTorch rounds by that.
        band = resize(scores[None, :, first:end].contiguous(), (end - first, width))[0]
        if blends:
            blended = band.index_select(1, below[rows] - first).mul_(weight[rows])
            band = blended.addcmul_(band.index_select(1, above[rows] - first), 1 - weight[rows])
        # max, not argmax, which takes three times as long on a CPU; both name the first of equal classes.
        labels[rows] = band.max(0).indices
    return labels


def resize(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize n×C×h×w bilinearly (half-pixel centres) to n×C×size, in float32; the same tensor if nothing changes."""
    scores = scores.float()
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return nn.functional.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


class _Averaged:
    """The average of one image's window scores after another, in one piece of memory, C×H×W."""

    def __init__(self, windows: _Windows) -> None:
        self._windows = windows
        self._total: torch.Tensor | None = None
        self._empty = True

    def add(self, score: torch.Tensor, rows: slice, columns: slice) -> None:
        """Add one window's scores, 1×C×h×w of any size."""
        side, coarse = self._windows.window, self._windows.coarse(score)
        score = resize(score, (side, side))[0]
        if self._total is None:
            size = self._windows.pixels.shape[2:]
            # As the scores lie in memory: convolutions return classes innermost, which adding would have to reorder.
            inner = coarse and score.stride(0) == 1
            self._total = (
                score.new_zeros(*size, len(score)).permute(2, 0, 1) if inner else score.new_zeros(len(score), *size)
            )
        elif self._empty:
            self._total.zero_()
        self._empty = False
        self._total[:, rows, columns].add_(score)  # += would copy the sum onto itself

    def take(self) -> torch.Tensor:
        """Return the average, which the next image's will overwrite."""
        self._empty = True
        return self._total.div_(self._windows.hits())


class _Windows:
    """The windows of B images, image by image, each from the top down and from left to right."""

    def __init__(self, pixels: torch.Tensor, window: int, stride: int, batch_size: int):
        if pixels.ndim != 4 or 0 in pixels.shape:
            raise InputError(f"pixel_values has shape {tuple(pixels.shape)}; sliding windows need B×3×H×W.")
        if not (window >= 1 and 1 <= stride <= window and batch_size >= 1):
            raise InputError(
                f"Sliding window {window} with stride {stride} and window batch {batch_size}: all must be positive, "
                "and the stride at most the window, or pixels between windows would get no prediction."
            )
        height, width = pixels.shape[2:]
        padding = (0, max(window - width, 0), 0, max(window - height, 0))
        # Padding by nothing would copy.
        self.pixels = nn.functional.pad(pixels, padding) if any(padding) else pixels
        self.window, self.batch_size = window, batch_size
        self.tops, self.lefts = (window_starts(size, window, stride) for size in (height, width))

    def scores(
        self, forward: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[int, slice, slice, torch.Tensor]]:
        """Yield every window's image, rows, columns and float32 scores 1×C×h×w.

        A batch of one as it is cut from `forward`'s tells PyTorch where the classes lie in memory: resizing takes a
        third of the time that it would where the batch's stride was lost.
        """
        corners = [(i, top, left) for i in range(len(self.pixels)) for top in self.tops for left in self.lefts]
        places = [(i, slice(top, top + self.window), slice(left, left + self.window)) for i, top, left in corners]
        for first in range(0, len(places), self.batch_size):
            group = places[first : first + self.batch_size]
            scores = forward(torch.stack([self.pixels[i, :, rows, columns] for i, rows, columns in group]))
            # One by one and in the order of the windows, so that the sums do not depend on how windows were batched.
            for (image, rows, columns), score in zip(group, scores.split(1), strict=True):
                yield image, rows, columns, score.float()
            del scores, score  # the next call of forward needs their place

    def coarse(self, score: torch.Tensor) -> bool:
        """Whether scores 1×C×h×w like these are worth keeping, to tell which classes can win where: not on a GPU."""
        places = len(self.tops) * len(self.lefts) * score.shape[2] * score.shape[3]
        height, width = self.pixels.shape[2:]
        return score.device.type == "cpu" and places <= _COARSE * height * width

    def is_last(self, rows: slice, columns: slice) -> bool:
        """Whether these are an image's last window."""
        return (rows.start, columns.start) == (self.tops[-1], self.lefts[-1])

    def hits(self) -> torch.Tensor:
        """How many windows see each pixel, float32 H×W."""
        counts = []
        for size, starts in zip(self.pixels.shape[2:], (self.tops, self.lefts), strict=True):
            count = torch.zeros(size)
            for start in starts:
                count[start : start + self.window] += 1
            counts.append(count.to(self.pixels.device))
        return counts[0][:, None] * counts[1]
