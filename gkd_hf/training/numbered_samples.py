"""Data sets of known length in an order that hangs on the seed alone, with every sample's place in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

PLACE = "place_in_run"


class PassOrder(Sampler[tuple[int, int]]):
    """The order of one pass: (place in the run's order, row) of every row.

    Args:
        num_rows: of the data set. seed: of the permutations, one for each pass. shuffle: False keeps the rows' order.
    """

    def __init__(self, num_rows: int, seed: int, shuffle: bool = True):
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rows = range(self.num_rows)
        if self.shuffle:
            # Multiplied, so that the next seed's passes are not this one's.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            rows = torch.randperm(self.num_rows, generator=generator).tolist()
        yield from enumerate(rows, start=self.epoch * self.num_rows)


class NumberedSamples(Dataset):
    """A data set, read through `order`, whose samples tell their place in the run's order as `PLACE`.

    That is what masks are drawn by, so neither a restart nor another number of processes changes them.

    Args:
        samples: by row. Mappings get their place beside what they hold; anything else stays as it is.
    """

    def __init__(self, samples: Dataset, order: PassOrder):
        self.samples = samples
        self.order = order

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place_and_row: tuple[int, int]) -> Any:
        place, row = place_and_row
        return _numbered(self.samples[row], place)

    def __getitems__(self, places_and_rows: list[tuple[int, int]]) -> list[Any]:
        """Read a batch, at once where the data set can."""
        rows = [row for _, row in places_and_rows]
        fetch = getattr(self.samples, "__getitems__", None)
        samples = fetch(rows) if fetch else [self.samples[row] for row in rows]
        return [_numbered(sample, place) for (place, _), sample in zip(places_and_rows, samples, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Begin a pass; Accelerate calls this, and does not find the order where a pass is begun in its middle."""
        self.order.epoch = epoch


def numbered_samples(samples: Dataset, arguments: TrainingArguments) -> NumberedSamples | None:
    """Number a data set's samples in the order that the arguments ask for; None where that is not possible."""
    shuffle = {"random": True, "sequential": False}.get(str(arguments.train_sampling_strategy))
    if shuffle is None or isinstance(samples, IterableDataset) or not has_length(samples):
        return None
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return NumberedSamples(samples, PassOrder(len(samples), seed, shuffle))


def places_of(samples: Sequence[Any], rank: int) -> list[int]:
    """Return the places of a device batch's samples in the run's order, by which masks are drawn.

    A stream of the user's own does not tell them: then torch's generator decides, which all processes begin alike, and
    ``rank``, this process's, keeps theirs apart.
    """
    # A data set's samples may have an `index` of their own, beside the place in the order that they are given.
    place = PLACE if PLACE in samples[0] else "index"
    if place in samples[0]:
        return [int(sample[place]) for sample in samples]
    return [number + rank for number in torch.randint(2**62, (len(samples),)).tolist()]


def _numbered(sample: Any, place: int) -> Any:
    return {PLACE: place, **sample} if isinstance(sample, Mapping) else sample
