"""How fast training data comes: bare decoding of the same bytes against the streams of both stages."""

from __future__ import annotations

import io
import itertools
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from gkd_hf.data.compressed import encode_label
from gkd_hf.data.decoding import decode_image, decode_label
from gkd_hf.data.label_maps import LabelMap
from gkd_hf.data.shards import count_rows, open_rows
from gkd_hf.data.streaming import SampleStream, collate
from gkd_hf.data.toy_city import render
from gkd_hf.data.transforms import DistillationTransform, SegmentationTransform
from gkd_hf.errors import InputError

WIDTH, HEIGHT = 1024, 512
_CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoaderSettings:
    """What is measured: numbers of things, and the crops' sides in pixels.

    Attributes:
        pictures: distinct pictures of a measurement's bare decoding, and of a set written for it.
        images: images per measurement. rounds: measurements of each kind, alternating.
        workers: worker processes. batch_size: images in a batch.
        stage1_size, stage2_size: side of the crop in each stage.
        device: where batches are normalised, "cpu" or "cuda".
    """

    pictures: int = 48
    images: int = 384
    rounds: int = 3
    workers: int = 2
    batch_size: int = 16
    stage1_size: int = 224
    stage2_size: int = 512
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "device" and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if self.images < self.batch_size:
            raise InputError(f"{self.images} images are less than one batch of {self.batch_size}")


class _BareDecoding(Dataset):
    """Item i: the i-th picture, modulo their number, decoded and thrown away."""

    def __init__(self, pictures: list[bytes], length: int) -> None:
        self.pictures, self.length = pictures, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return Image.open(io.BytesIO(self.pictures[index % len(self.pictures)])).convert("RGB").width


def rendered(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``count`` pictures of 1024×512 pixels with labels: two scenes of the toy city side by side."""
    for start in range(0, 2 * count, 2):
        images, labels = render("clear_day", 2, size=HEIGHT, start=start)
        yield np.hstack(images), np.hstack(labels)


def tiled(folder: str, split: str, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``count`` pictures of 1024×512 pixels with labels: each row of a folder, repeated side by side, below."""
    for row in itertools.islice(itertools.cycle(open_rows(folder, split)), count):
        image, label = np.asarray(decode_image(row["image"], folder)), decode_label(row["label"], folder)
        down, across = -(-HEIGHT // label.shape[0]), -(-WIDTH // label.shape[1])
        yield np.tile(image, (down, across, 1))[:HEIGHT, :WIDTH], np.tile(label, (down, across))[:HEIGHT, :WIDTH]


def _jpeg(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_pairs(pairs: Iterator[tuple[np.ndarray, np.ndarray]], folder: str) -> None:
    """Write images as JPEGs (quality 95) and labels to one shard of the split ``train``, as prepared data are."""
    pictures, ids = zip(*((_jpeg(image), encode_label(label)) for image, label in pairs), strict=True)
    images, labels = ([{"bytes": cell, "path": None} for cell in cells] for cells in (pictures, ids))
    names = [f"picture{number}" for number in range(len(images))]
    table = pa.table({"image": pa.array(images, _CELL), "label": pa.array(labels, _CELL), "id": names})
    pq.write_table(
        table,
        f"{folder}/train-00000-of-00001.parquet",
        row_group_size=1,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )


def _own_mib() -> float:
    """Resident memory that this process shares with no other, MiB; 0 where the system does not tell."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return 0.0
    _, resident, shared = statistics.read_text().split()[:3]
    return (int(resident) - int(shared)) * resource.getpagesize() / 2**20


class _Clocked:
    """Collates and adds the worker's number, the processor seconds that it has used and its resident memory."""

    def __init__(self, collate_samples: Callable[[list], object]) -> None:
        self._collate = collate_samples

    def __call__(self, samples: list) -> tuple[object, int, float, float]:
        batch = self._collate(samples)
        return batch, get_worker_info().id, time.process_time(), _own_mib()


def _loader(
    dataset: Dataset | IterableDataset, collate_samples: Callable[[list], object], settings: LoaderSettings
) -> Iterator[tuple[object, int, float, float]]:
    return iter(
        DataLoader(
            dataset,
            settings.batch_size,
            num_workers=settings.workers,
            prefetch_factor=2,
            collate_fn=_Clocked(collate_samples),
        )
    )


def _resident(stream: SampleStream, settings: LoaderSettings, rows: int) -> list[float]:
    """Resident memory of all workers after each of three passes over the rows, or thirds of 3 × ``images`` images."""
    loader, memory, found = _loader(stream, collate, settings), {}, []
    batches = -(-min(rows, settings.images) // settings.batch_size)
    for _ in range(3):
        for _ in range(max(batches, settings.workers)):
            _, worker, _, memory[worker] = next(loader)
        found.append(round(sum(memory.values()), 1))
    return found


def _timed(
    dataset: Dataset | IterableDataset, collate_samples: Callable[[list], object], settings: LoaderSettings
) -> tuple[float, float, float]:
    """Images per second once the workers run; milliseconds per image of the workers' processors and of normalising.

    A stream's batches are normalised, and erased, as they come, as the trainers do.
    """
    loader = _loader(dataset, collate_samples, settings)
    clocks: dict[int, float] = {}
    for _ in range(2 * settings.workers):  # starting and the first rows are not counted
        _, worker, clock, _ = next(loader)
        clocks[worker] = clock
    batches, used, normalising = settings.images // settings.batch_size, 0.0, 0.0
    began = time.perf_counter()
    for _ in range(batches):
        batch, worker, clock, _ = next(loader)
        used += clock - clocks[worker]
        clocks[worker] = clock
        if isinstance(dataset, SampleStream):
            start = time.perf_counter()
            dataset.normalised(batch | {"pixel_values": batch["pixel_values"].to(settings.device)})
            if settings.device != "cpu":
                torch.cuda.synchronize()
            normalising += time.perf_counter() - start
    images = batches * settings.batch_size
    return images / (time.perf_counter() - began), 1000 * used / images, 1000 * normalising / images


def measure(folder: str, split: str, label_map: LabelMap, settings: LoaderSettings) -> dict:
    """Time bare decoding and the three streams over a folder of shards; prints each measurement.

    Returns ``workers``; ``images_per_second``, the fastest of each kind; ``ratio``, that to bare decoding's;
    ``cpu_ms``, the least processor time of the workers per image; ``cpu_ratio``, bare decoding's to it;
    ``normalise_ms``, the least time per image that the main process normalises, while the workers decode;
    ``resident_mib``, what the workers of the stage-2 stream hold in memory after each of three passes.
    """
    rows, images, size = open_rows(folder, split), open_rows(folder, split, columns=("image",)), settings.stage1_size
    length = (settings.images // settings.batch_size + 8 * settings.workers) * settings.batch_size
    pictures = [row["image"]["bytes"] for row in itertools.islice(rows, settings.pictures)]
    common = {"seed": 0, "micro_batch_size": settings.batch_size, "num_rows": count_rows(folder, split)}
    plain = DistillationTransform(size, _MEAN, _STD, rand_augment=False, erase_probability=0.0)
    labels = {"label_map": label_map}
    streams = {
        "bare_decode": (_BareDecoding(pictures, length), default_collate),
        "stage1_crop_flip": (SampleStream(images, plain, **common), collate),
        "stage1_full": (
            SampleStream(images, DistillationTransform(size, _MEAN, _STD), **common),
            collate,
        ),
        "stage2": (
            SampleStream(rows, SegmentationTransform(settings.stage2_size, _MEAN, _STD), **common, **labels),
            collate,
        ),
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in streams}
    for turn in range(settings.rounds):
        for name, (dataset, collate_samples) in streams.items():
            found[name].append(_timed(dataset, collate_samples, settings))
            rate, cpu, _ = found[name][-1]
            print(f"round {turn + 1}  {name:17s} {rate:7.1f} images/s  {cpu:6.2f} cpu ms/image", flush=True)
    rates = {name: max(rate for rate, _, _ in turns) for name, turns in found.items()}
    cpu = {name: min(used for _, used, _ in turns) for name, turns in found.items()}
    normalising = {name: min(used for _, _, used in turns) for name, turns in found.items()}
    return {
        "workers": settings.workers,
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": {name: round(rate / rates["bare_decode"], 3) for name, rate in rates.items()},
        "cpu_ms": {name: round(used, 2) for name, used in cpu.items()},
        "cpu_ratio": {name: round(cpu["bare_decode"] / used, 3) for name, used in cpu.items()},
        "normalise_ms": {name: round(used, 2) for name, used in normalising.items()},
        "resident_mib": _resident(streams["stage2"][0], settings, common["num_rows"]),
    }
