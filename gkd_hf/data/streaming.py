"""Streams of decoded, transformed samples: endless and exactly resumable for training, finite for evaluation."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
import torch.utils.data
from torch.utils.data import default_collate

from gkd_hf.data.bad_rows import BAD_ROW_LIMIT, BadRows, check_bad_rows, row_identity
from gkd_hf.data.decoding import CorruptImage
from gkd_hf.data.domains import LabelSpace
from gkd_hf.data.label_maps import LabelMap
from gkd_hf.data.mixing import MixedOrder, Source, check_sources
from gkd_hf.data.row_decoder import RowDecoder
from gkd_hf.data.rows import ShardRows
from gkd_hf.data.shards import Rows
from gkd_hf.data.streamed_order import StreamedOrder
from gkd_hf.data.transforms import DistillationTransform, EvaluationTransform, SegmentationTransform
from gkd_hf.data.views import view_generator
from gkd_hf.errors import InputError


class DataError(InputError):
    """An ``InputError`` found while reading rows; keeps its one line when it crosses a ``DataLoader`` worker.

    A worker's exception is rebuilt in the main process from its whole traceback text.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("DataError: ")[2].strip())


def _undecoded(rows: Rows) -> Rows:
    if isinstance(rows, ShardRows):
        return rows
    import datasets

    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image) and feature.decode:
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _worker() -> tuple[int, int]:
    info = torch.utils.data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class SampleStream(torch.utils.data.IterableDataset):
    """An endless, globally ordered stream of transformed samples.

    The g-th sample of a run is a pure function of (seed, g), whatever the number of processes and workers: its row is
    the g-th of all passes (each pass in a new order), its augmentation draws from a generator seeded by (seed, g), or
    with ``views`` = k by (seed, the image, p mod k) in pass p: each image then has k fixed views, seen in turn.
    The order is cut into global micro batches of ``micro_batch_size * world_size``; rank r takes the r-th contiguous
    slice of each, and ``DataLoader`` worker w of W every W-th micro batch, so that a loader with
    ``batch_size=micro_batch_size`` returns the slices in order. Use it with ``dispatch_batches=False`` and without any
    further splitting. Samples before ``start`` are skipped without being decoded, nor read where ``rows`` are
    `ShardRows`.

    A row that cannot be decoded, or whose label is missing, in colours, of another size than its image or outside the
    map, is skipped: the next good row takes its place, so that this one is seen twice in that pass, and it is reported
    under ``bad_rows``.

    Args:
        rows: from ``open_rows``, or any ``IterableDataset`` with an ``image`` (and ``label``, ``id``) column, which
            each reader has to read from the start of the pass.
        transform: ``transform(image, rng)`` or, with a label map, ``transform(image, rng, label)`` → dict of tensors.
        seed: of order and augmentation, ≥ 0.
        micro_batch_size: samples in one process's batch.
        rank: this process; world_size: number of processes.
        start: index of the first sample to yield, a multiple of the global micro batch.
        shuffle: a new order in each pass, or the stored order.
        buffer_size: rows in the shuffle buffer of an ``IterableDataset`` (at most 256 MiB of them, in each worker);
            where shards have to be fetched, the least number of rows, of whole shards, that are shuffled together.
        domain: name for messages and reports.
        label_map: labels are decoded, mapped and yielded only if given.
        bad_row_limit: largest fraction of bad rows that is skipped.
        num_rows: rows in one pass of an ``IterableDataset`` if known; saves reading it once when resuming.
        views: fixed views of each image, ≥ 1; None: a new one each time.

    Yields what the transform returns (`DistillationTransform` and `SegmentationTransform`: uint8 pixels, of which
    `normalised` makes floats on the device, and ``erasing`` or uint8 ``labels``) with ``{"index": g, "bad_rows":
    [entry]}``, each entry ``{domain, id, reason, shard, row}``: the shard's name within the data set and the row
    counted from 0 within it, both None where rows are streamed.
    Raises ``InputError`` for an empty or unreadable data set, and for too many bad rows.
    """

    def __init__(
        self,
        rows: Rows,
        transform: Callable[..., dict[str, torch.Tensor]],
        *,
        seed: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        shuffle: bool = True,
        buffer_size: int = 2048,
        domain: str = "",
        label_map: LabelMap | None = None,
        bad_row_limit: float = BAD_ROW_LIMIT,
        num_rows: int | None = None,
        views: int | None = None,
    ) -> None:
        if seed < 0:
            raise InputError(f"seed is {seed}: it must be 0 or greater")
        if views is not None and views < 1:
            raise InputError(f"views is {views}: give 1 fixed view of each image or more, or null for new ones")
        if buffer_size < 1:
            raise InputError(f"buffer_size is {buffer_size}: it must be 1 or greater")
        self.sources = (Source(_undecoded(rows), domain, label_map, num_rows=num_rows),)
        self.transform = transform
        self.seed = seed
        self.shuffle = shuffle
        self.buffer_size = buffer_size
        self.bad_row_limit = bad_row_limit
        self.views = views
        self._place(micro_batch_size, rank, world_size, start)

    @classmethod
    def mixed(
        cls, sources: Sequence[Source], transform: Callable[..., dict[str, torch.Tensor]], **settings: Any
    ) -> SampleStream:
        """Return the stream of several sources.

        Without weights one pass is the union: each row of each source once, in one shuffled order. With weights each
        1024 samples hold every source in its share, to 1/1024, and each source goes through its own passes.

        Args:
            sources: what to mix. transform: of all.
            settings: ``seed``, ``micro_batch_size``, ``rank``, ``world_size``, ``start``, ``shuffle``, ``views``,
                ``buffer_size`` and ``bad_row_limit``, which holds for each domain, as of the constructor.

        Raises ``InputError`` as `check_sources` does.
        """
        check_sources(sources)
        stream = cls(sources[0].rows, transform, **settings)
        stream.sources = tuple(replace(source, rows=_undecoded(source.rows)) for source in sources)
        return stream

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(source.domain for source in self.sources)

    @property
    def num_rows(self) -> int | None:
        """Rows of all sources in one pass; None if that is not known yet."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(sizes)

    def normalised(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the pixels of a collated batch as the model takes them, float32 B×3×H×W, on their device.

        Bytes are normalised, and erased in stage 1, as the transform says; floats are taken as they are.
        """
        pixels = batch["pixel_values"]
        if pixels.dtype != torch.uint8:
            return pixels
        return self.transform.normalise(pixels, *([batch["erasing"]] if "erasing" in batch else []))

    def check_bad_rows(self, entries: Sequence[dict[str, Any]]) -> None:
        """Raise ``InputError`` if the ``entries`` of bad rows are too many of a domain; one that repeats counts once.

        Of a source whose number of rows is not known nothing can be said.
        """
        for source in self.sources:
            if source.size is not None:
                own = [entry for entry in entries if entry["domain"] == source.domain]
                check_bad_rows(source.domain, own, source.size, self.bad_row_limit)

    def _place(self, micro_batch_size: int, rank: int, world_size: int, start: int) -> None:
        if micro_batch_size < 1 or not 0 <= rank < world_size or start < 0:
            raise InputError(
                f"impossible share of the data: batch {micro_batch_size}, rank {rank} of {world_size}, start {start}"
            )
        if start % (micro_batch_size * world_size):
            raise InputError(
                f"cannot resume at sample {start}: it is not a multiple of the batch of {micro_batch_size} on "
                f"{world_size} process(es); resume with the batch size and number of processes of the first run"
            )
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def shard(self, micro_batch_size: int, rank: int, world_size: int, start: int = 0) -> SampleStream:
        """Return a copy for one process of a run, starting at sample ``start``."""
        other = copy.copy(self)
        other._place(micro_batch_size, rank, world_size, start)
        return other

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._samples()
        except InputError as error:
            raise DataError(str(error)) from None

    def _samples(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = _worker()
        order = MixedOrder(self.sources, seed=self.seed, shuffle=self.shuffle, buffer_size=self.buffer_size)
        readers = [
            (
                RowDecoder(source.domain, source.label_map),
                BadRows(source.domain, self.bad_row_limit, num_rows, shuffled=self.shuffle),
            )
            for source, num_rows in zip(self.sources, order.row_counts(), strict=True)
        ]
        global_batch = self.micro_batch_size * self.world_size
        for batch in itertools.count(worker, num_workers):
            first = self.start + batch * global_batch + self.rank * self.micro_batch_size
            for index in range(first, first + self.micro_batch_size):
                order.release(index)
                sample, reported = self._next_readable(index, order, readers)
                yield {**sample, "index": index, "bad_rows": reported}

    def _transformed(self, row: dict, rng: np.random.Generator, decode: RowDecoder) -> dict[str, torch.Tensor]:
        own = SegmentationTransform if decode.labelled else DistillationTransform
        # A subclass may transform in another way; what it says must not be passed by.
        if isinstance(self.transform, own) and type(self.transform).__call__ is own.__call__:
            return decode.crop(row, self.transform, rng)
        image, label = decode(row)
        return self.transform(image, rng) if label is None else self.transform(image, rng, label)

    def _next_readable(
        self, index: int, order: MixedOrder, readers: Sequence[tuple[RowDecoder, BadRows]]
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        reported: list[dict[str, Any]] = []
        for position in itertools.count(index):
            row = order.row(position)
            decode, bad = readers[order.source(position)]
            bad.attempted += 1
            try:
                if self.views is None:
                    rng = np.random.default_rng([self.seed, index])
                else:
                    view = order.pass_number(position) % self.views
                    rng = view_generator(self.seed, decode.encoded_bytes(row), view)
                return self._transformed(row, rng, decode), reported
            except CorruptImage as error:
                reported.append(bad.add(row, str(error), order.place(position)))
            if len(reported) >= order.num_rows:
                raise InputError(
                    f"no readable row in a whole pass ({len(reported)} rows); the first is {reported[0]['id']} "
                    f"({reported[0]['reason']})"
                )
        raise AssertionError("unreachable: the rows are endless")


class EvaluationSet(torch.utils.data.IterableDataset):
    """A finite, ordered set of labelled images at their domain's test size; image i goes to rank i mod ``world_size``.

    Args:
        rows: from ``open_rows``, with ``image`` and ``label``.
        transform: resizes the image; the label keeps its own size.
        label_map, label_space: of the domain.
        domain: name for messages and reports.
        limit: use only the first ``limit`` images; ``None`` uses all.
        bad_row_limit: largest fraction of bad rows that is skipped.
        num_rows: rows of an ``IterableDataset`` if known, for progress bars alone.

    Yields ``{"pixel_values": uint8 3×H×W, "labels": uint8 h×w, "image": uint8 h×w×3, "id": str, "bad_rows": list}``
    where h×w is the image's own size; `normalised` makes of the pixels what the model takes. A bad row is left out
    and reported with the reader's next image (or its last one); a reader whose whole share is bad yields one sample
    whose other entries are ``None``.
    Raises ``InputError`` as ``SampleStream`` does.
    """

    def __init__(
        self,
        rows: Rows,
        transform: EvaluationTransform,
        *,
        label_map: LabelMap,
        label_space: LabelSpace,
        domain: str,
        limit: int | None = None,
        bad_row_limit: float = BAD_ROW_LIMIT,
        rank: int = 0,
        world_size: int = 1,
        num_rows: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit} for domain '{domain}': give 1 or more, or null for all images")
        self.rows = _undecoded(rows)
        self.transform = transform
        self.label_map = label_map
        self.label_space = label_space
        self.domain = domain
        self.limit = limit
        self.bad_row_limit = bad_row_limit
        self.rank = rank
        self.world_size = world_size
        self.num_rows = len(rows) if isinstance(rows, ShardRows) else num_rows
        self.pictures: int | None = None

    @property
    def share(self) -> int | None:
        """Images of this process, bad ones included; None if the number of rows is not known."""
        if self.num_rows is None:
            return None
        images = self.num_rows if self.limit is None else min(self.limit, self.num_rows)
        return len(range(self.rank, images, self.world_size))

    def shard(self, rank: int, world_size: int, pictures: int | None = None) -> EvaluationSet:
        """Return a copy for one process.

        Args:
            pictures: images of each reader with which ``"image"`` comes, None with the others: as large as they are
                stored, they are most of what a sample passes between processes. ``None`` is all.
        """
        other = copy.copy(self)
        other.rank, other.world_size, other.pictures = rank, world_size, pictures
        return other

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 …×3×H×W as the model takes them, float32, on their device; floats are taken as they are."""
        return self.transform.normalise(pixels) if pixels.dtype == torch.uint8 else pixels

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._samples()
        except InputError as error:
            raise DataError(str(error)) from None

    def _samples(self) -> Iterator[dict[str, Any]]:
        streamed = None
        if not isinstance(self.rows, ShardRows):
            streamed = StreamedOrder(self.rows, seed=0, shuffle=False, buffer_size=1, num_rows=None, name=self.domain)
        decode = RowDecoder(self.domain, self.label_map)
        num_rows = (lambda: len(self.rows)) if streamed is None else (lambda: streamed.num_rows)
        bad = BadRows(self.domain, self.bad_row_limit, num_rows, shuffled=False)
        # One sample is held back so that bad rows at the end still find one to travel with.
        held: dict[str, Any] | None = None
        reported: list[dict[str, Any]] = []
        readable = 0
        for place, row in self._own_rows(streamed):
            bad.attempted += 1
            try:
                image, label = decode(row)
            except CorruptImage as error:
                reported.append(bad.add(row, str(error), place))
                continue
            if held is not None:
                yield held
            held = {
                "pixel_values": self.transform(image),
                "labels": torch.from_numpy(np.array(label)),
                "image": np.array(image) if self.pictures is None or readable < self.pictures else None,
                "id": row_identity(row),
                "bad_rows": reported,
            }
            readable += 1
            reported = []
        if held is None:
            if not reported:
                return
            held = {"pixel_values": None, "labels": None, "image": None, "id": None, "bad_rows": []}
        held["bad_rows"] = held["bad_rows"] + reported
        yield held

    def _own_rows(self, streamed: StreamedOrder | None) -> Iterator[tuple[tuple[str | None, int | None], dict]]:
        worker, num_workers = _worker()
        reader, num_readers = self.rank + self.world_size * worker, self.world_size * num_workers
        if streamed is None:
            for index in range(len(self.rows))[: self.limit][reader::num_readers]:
                yield self.rows.place(index), self.rows[index]
            return
        count = 0
        for count, row in enumerate(itertools.islice(streamed.one_pass(), self.limit), start=1):
            if (count - 1) % num_readers == reader:
                yield (None, None), row
        if count == 0:
            raise InputError(f"domain '{self.domain}' has no rows: check the folder and the split")


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collect training samples: ``pixel_values`` B×3×S×S and ``labels`` B×S×S stacked, the others as flat lists.

    ``erasing`` has an entry for each sample and ``bad_rows`` one for each row that was skipped. Both ``labels`` and
    ``erasing`` are there if the samples have them. Raises ``InputError`` if the workers' shared memory is full.
    """
    batch: dict[str, Any] = {
        key: stacked([sample[key] for sample in samples]) for key in ("pixel_values", "labels") if key in samples[0]
    }
    if "erasing" in samples[0]:
        batch["erasing"] = [sample["erasing"] for sample in samples]
    batch["bad_rows"] = [row for sample in samples for row in sample.get("bad_rows", [])]
    return batch


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors of one shape; in a worker, in shared memory.

    Raises ``InputError`` if that is full.
    """
    first = parts[0]
    whole = first.dtype == torch.uint8 and all(part.shape == first.shape and part.is_contiguous() for part in parts)
    in_worker = torch.utils.data.get_worker_info() is not None
    if not (whole and in_worker and torch.multiprocessing.get_sharing_strategy() == "file_descriptor"):
        return default_collate(list(parts))
    # Written through its file, shared memory comes without a page fault for every 4 KiB, which are half of the cost.
    storage = torch.UntypedStorage._new_shared(len(parts) * first.numel())
    file, _ = storage._share_fd_cpu_()
    try:
        for number, part in enumerate(parts):
            if os.pwrite(file, part.numpy(), number * first.numel()) != first.numel():
                raise OSError("not all could be written")
    except OSError as error:
        raise DataError(
            f"a batch of {storage.nbytes()} bytes cannot be passed on through shared memory ({error}): give the "
            "machine more of it (a container's --shm-size), or use fewer workers or smaller batches"
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(len(parts), *first.shape)


def collate_evaluation(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collect evaluation samples: ``labels``, ``image``, ``id`` lists, ``bad_rows`` one flat list.

    ``pixel_values`` is B×3×H×W when all images have one size, else a list of 3×H×W. All are empty lists when the
    samples carry nothing but bad rows.
    """
    readable = [sample for sample in samples if sample["pixel_values"] is not None]
    pixel_values: Any = [sample["pixel_values"] for sample in readable]
    if len({tuple(image.shape) for image in pixel_values}) == 1:
        pixel_values = stacked(pixel_values)
    return {
        "pixel_values": pixel_values,
        "labels": [sample["labels"] for sample in readable],
        "image": [sample["image"] for sample in readable],
        "id": [sample["id"] for sample in readable],
        "bad_rows": [row for sample in samples for row in sample["bad_rows"]],
    }
