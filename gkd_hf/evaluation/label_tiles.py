"""Labels of averaged window scores, tile by tile, resizing only the classes that can win there.

Resizing bilinearly, averaging windows and resizing to the label's size give every pixel a convex combination of scores
as the model wrote them, with the same weights for every class. A class that one other surpasses in all scores that a
tile of labels is made of therefore wins nowhere in it, and needs not be resized there. Inside an object one class is
left, and the tile is known without any resizing. The others are resized as the whole image would be: by the same
operations in the same order, so that their scores are the same: to the last bit with the kernels that PyTorch has for
AVX2 and AVX-512, which fuse multiplications with additions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

SIDE = 16
"""Height and width of a tile, in pixels of the label."""
_AT_ONCE = 4096  # tiles times classes that are computed together: 4 MiB of scores
_SAMPLE = 128
_WORTH = 0.25  # of all tiles times classes: computing more of them one by one takes longer than resizing everything
# Relative to the largest score: hundred times what rounding can do to the few sums and products of a pixel.
_MARGIN = 2.0**-16


@dataclass(frozen=True)
class WindowScores:
    """What the model says of one window.

    Attributes:
        scores: float32 C×h×w, of any size.
        rows, columns: the pixels of the image that they stand for; may reach beyond it.
    """

    scores: torch.Tensor
    rows: slice
    columns: slice


def labels_by_tiles(
    averaged: torch.Tensor, windows: Sequence[WindowScores], label_size: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor | None:
    """Return the best class at every pixel of the label, of equal classes the first.

    Args:
        averaged: float32 C×H×W on a CPU, the average of what the windows say of each pixel.
        windows: those of one image that see a pixel of ``averaged``. label_size: (height, width) of the label.
        dtype: integers that hold the classes.

    Returns:
        label_height×label_width; or None where resizing everything is the faster way, or the only one: many classes
        are near everywhere, or scores are not finite, or the label is smaller than the image.
    """
    size = averaged.shape[1:]
    if label_size[0] < size[0] or label_size[1] < size[1]:
        return None
    classes = len(averaged)
    largest = torch.stack([extreme.abs() for window in windows for extreme in window.scores.aminmax()]).max()
    if not (largest * len(windows)).isfinite():  # nor may sums over windows overflow
        return None
    margin = _MARGIN * largest
    axes = tuple(_LabelAxis.of(*lengths) for lengths in zip(size, label_size, strict=True))
    views = [_View.of(window, size, label_size) for window in windows]
    lowest = torch.full((axes[0].tiles, axes[1].tiles), classes, dtype=torch.int32)
    step = max(1, lowest.numel() // _SAMPLE)
    sample = (lowest > 0).nonzero()[step // 2 :: step]
    possible = _candidates(views, sample, margin).sum(1)
    if possible[possible > 1].sum() > _WORTH * classes * len(sample):
        return None
    highest = torch.full_like(lowest, -1)
    for view in views:
        view.note_best(lowest, highest, margin)
    open_tiles = (lowest != highest).nonzero()
    tiled = lowest.to(dtype)[:, None, :, None].repeat(1, SIDE, 1, SIDE)
    possible = [_candidates(views, tiles, margin) for tiles in open_tiles.split(_AT_ONCE)]
    for some, chosen in _by_number(torch.cat(possible)) if possible else ():
        at = open_tiles[some]
        best = _resized(averaged, axes, at, chosen).max(1).indices
        named = chosen.gather(1, best.flatten(1)).view_as(best)
        tiled[at[:, 0], :, at[:, 1]] = named.to(dtype)
    whole = tiled.view(axes[0].tiles * SIDE, axes[1].tiles * SIDE)
    return whole[: label_size[0], : label_size[1]].contiguous()


def _by_number(possible: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tiles n with as many possible classes each, and these classes n×k, ascending; of n×C booleans."""
    counts = possible.sum(1)
    for count in counts.unique().tolist():
        some = (counts == count).nonzero()[:, 0]
        chosen = possible[some].nonzero()[:, 1].view(len(some), count)
        step = max(1, _AT_ONCE // count)
        yield from zip(some.split(step), chosen.split(step), strict=True)


def _candidates(views: Sequence[_View], tiles: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Which classes can win in tiles n×2, n×C booleans: those that one good class does not surpass everywhere."""
    around = [view.around(tiles) for view in views]
    classes = views[0].scores.shape[0]
    least = torch.full((len(tiles), classes), torch.inf)
    for inside, scores in around:
        least[inside] = torch.minimum(least[inside], scores.amin(1))
    reference = least.max(1, keepdim=True).indices
    ahead = torch.full((len(tiles), classes), -torch.inf)
    for inside, scores in around:
        own = scores.gather(2, reference[inside][:, None].expand(-1, scores.shape[1], 1))
        ahead[inside] = torch.maximum(ahead[inside], (scores - own).amax(1))
    return ahead >= -margin


def _resized(
    averaged: torch.Tensor, axes: tuple[_LabelAxis, _LabelAxis], tiles: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Scores of the ``chosen`` classes n×k in tiles n×2 at the label's size, n×k×SIDE×SIDE.

    Rounded as by PyTorch's bilinear kernel: rows before columns, of each pair the far product by itself and the near
    one with the sum.
    """
    (down, across), (i, j), (by_class, by_row, by_column) = axes, tiles.unbind(1), averaged.stride()
    reach = sum((length - 1) * step for length, step in zip(averaged.shape, averaged.stride(), strict=True))
    flat = averaged.as_strided((reach + 1,), (1,))  # whichever axis is innermost
    starts = chosen[:, :, None, None] * by_class + down.sources[i][:, None, None] * by_row
    # The columns of a tile's source one after the other, each from the top down: whole ones are copied at once.
    block = flat.take(starts + across.sources[j][:, None, :, None] * by_column)
    wide = _blend(*_pick(block, across.within[:, j]), across.weight[j][:, None, :, None]).transpose(2, 3).contiguous()
    return _blend(*_pick(wide, down.within[:, i]), down.weight[i][:, None, :, None])


def _pick(parts: torch.Tensor, places: torch.Tensor) -> list[torch.Tensor]:
    """What stands at the near and at the far ``places``, 2×n×SIDE, of n×k×F×m along F: two of n×k×SIDE×m."""
    n, k, length = parts.shape[:3]
    starts, parts_by_place = (torch.arange(n * k) * length).view(n, k, 1), parts.flatten(0, 2)
    return [parts_by_place.index_select(0, (starts + each[:, None]).flatten()).view(n, k, SIDE, -1) for each in places]


def _blend(near: torch.Tensor, far: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """near·(1 − weight) + far·weight, in the memory of ``far``."""
    return far.mul_(weight).addcmul_(near, 1 - weight)


@dataclass(frozen=True)
class _LabelAxis:
    """One axis of the labels, cut into tiles, and the pixels of the image that they are blended of.

    Attributes:
        sources: tiles×F, all pixels of the image that a tile is blended of.
        within: 2×tiles×SIDE, where the near and the far one stand among ``sources``.
        weight: tiles×SIDE, of the far one.
    """

    sources: torch.Tensor
    within: torch.Tensor
    weight: torch.Tensor

    @property
    def tiles(self) -> int:
        return len(self.sources)

    @staticmethod
    @functools.lru_cache
    def of(source: int, target: int) -> _LabelAxis:
        near, far, weight = blended_places(source, target)
        places = torch.arange(-(-target // SIDE) * SIDE).clamp(max=target - 1).view(-1, SIDE)
        near, far, weight = near[places], far[places], weight[places]
        first, last = near[:, :1], far[:, -1:]
        sources = torch.minimum(first + torch.arange(int((last - first).max()) + 1), last)
        return _LabelAxis(sources, torch.stack([near - first, far - first]), weight)


@dataclass(frozen=True)
class _WindowAxis:
    """One axis of a window, seen from the tiles that it has a part of.

    Attributes:
        first, end: those tiles. cells: tiles×L, all places in the window's scores that a tile is made of.
    """

    first: int
    end: int
    cells: torch.Tensor

    @staticmethod
    @functools.lru_cache
    def of(source: int, target: int, start: int, side: int, scores: int) -> _WindowAxis:
        pixels = _LabelAxis.of(source, target).sources - start
        of_tiles = ((pixels >= 0) & (pixels < side)).any(1).nonzero()[:, 0]
        first, end = int(of_tiles[0]), int(of_tiles[-1]) + 1
        pixels = pixels[first:end].clamp(0, side - 1)
        near, far, _ = blended_places(scores, side)
        low, high = near[pixels[:, :1]], far[pixels[:, -1:]]
        return _WindowAxis(first, end, torch.minimum(low + torch.arange(int((high - low).max()) + 1), high))


@dataclass(frozen=True)
class _View:
    """A window's scores, C×h×w and h·w×C, and its axes."""

    scores: torch.Tensor
    by_place: torch.Tensor
    down: _WindowAxis
    across: _WindowAxis

    @staticmethod
    def of(window: WindowScores, size: tuple[int, int], label_size: tuple[int, int]) -> _View:
        down, across = (
            _WindowAxis.of(source, target, pixels.start, pixels.stop - pixels.start, places)
            for source, target, pixels, places in zip(
                size, label_size, (window.rows, window.columns), window.scores.shape[1:], strict=True
            )
        )
        return _View(window.scores.contiguous(), window.scores.flatten(1).t().contiguous(), down, across)

    def note_best(self, lowest: torch.Tensor, highest: torch.Tensor, margin: torch.Tensor) -> None:
        """Lower and raise, for each tile, the classes that are best in one of its scores; to -1 and C if none is."""
        best, named = self.scores.max(0)
        second = self.scores.scatter(0, named[None], -torch.inf).amax(0)
        unsure, named = best - second <= margin, named.int()
        rows, columns = slice(self.down.first, self.down.end), slice(self.across.first, self.across.end)
        low = self._around_tiles(named.masked_fill(unsure, -1)).amin((1, 3))
        high = self._around_tiles(named.masked_fill(unsure, len(self.scores))).amax((1, 3))
        lowest[rows, columns] = torch.minimum(lowest[rows, columns], low)
        highest[rows, columns] = torch.maximum(highest[rows, columns], high)

    def _around_tiles(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of tiles × L × columns of tiles × M of h×w."""
        return values[self.down.cells][:, :, self.across.cells]

    def around(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of tiles n×2 have a part of this window, m, and all scores that they are made of, m×L·M×C."""
        (i, j), down, across = tiles.unbind(1), self.down, self.across
        mine = ((i >= down.first) & (i < down.end) & (j >= across.first) & (j < across.end)).nonzero()[:, 0]
        rows, columns = down.cells[i[mine] - down.first], across.cells[j[mine] - across.first]
        return mine, self.by_place[(rows[:, :, None] * self.scores.shape[2] + columns[:, None]).flatten(1)]


def blended_places(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each of ``target`` pixels of an axis: the ``source`` pixels next to its centre, and the second's weight.

    Half-pixel centres, as PyTorch's bilinear resizing: the scale is rounded to float32, and the coordinate once, as by
    the fused multiply-add of its kernel.
    """
    scale = (torch.tensor(float(source)) / target).double()
    centre = (scale * (torch.arange(target, dtype=torch.float64) + 0.5) - 0.5).clamp(min=0).float()
    near = centre.long().clamp(max=source - 1)
    return near, (near + 1).clamp(max=source - 1), (centre - near).clamp(0, 1)
