"""Time a stage-1 step whose teacher tokens are read against one that computes them; tell when keeping them pays."""

from __future__ import annotations

import math
import secrets
import statistics
import tempfile
import time
from typing import Any

from gkd_hf.benchmarks.step import StepSettings, arms_of
from gkd_hf.benchmarks.step_arms import Ours
from gkd_hf.benchmarks.timing import ratio, timed_in_turn
from gkd_hf.data.views import KEY_BYTES, view_keys
from gkd_hf.distillation.token_store import TokenStore, token_bytes
from gkd_hf.errors import InputError
from gkd_hf.training.teacher_cache import TeacherCache

IMAGENET = 1_281_167  # training images of ILSVRC 2012
KEPT_BYTES = 256 * 2**20  # so much is kept for the arm that reads, which takes another batch of it in each step
MOST_VIEWS = 1024


def measure(settings: StepSettings, folder: str | None = None) -> dict[str, Any]:
    """Measure the trainer's step in three ways, with the same weights and images.

    ``recomputed`` asks the teacher. ``cached`` reads all tokens from shards on disk, which are in the system's page
    cache: a disk that delivers ``read_mb_per_s`` keeps up with it. ``kept`` is the first pass over a view: the teacher
    is asked, its tokens are copied, written as a shard and read back.

    Args:
        settings: as of the step's own benchmark; its rounds hold for each arm.
        folder: for the shards; None takes the system's temporary folder.

    Returns:
        speedup: recomputed / cached, the median of neighbouring steps. step_ms: by arm.
        pays_after_passes: over one view, the first of which computes and writes it: from so many on it has taken less
            time than recomputing; None if reading is no faster.
        bytes_per_view: on disk. imagenet_gb_per_view: of ImageNet's training images.
        read_mb_per_s, key_ms, loss_difference: what a disk must deliver; what a worker spends on a view's key;
            relative, of the cached step's loss, whose tokens have 16 bits.

    Raises:
        InputError: as the step's benchmark, or a folder that cannot be written.
    """
    try:
        place = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise InputError(f"shards cannot be written to '{folder}' ({error.strerror}): give another folder") from error
    with place as root, arms_of(settings) as arms:
        ours: Ours = arms.pop("ours")
        arms.clear()  # the others' weights are not needed
        batch, teaching = dict(ours.batch), ours.trainer._teaching
        store = TokenStore(root)
        (teacher,) = teaching.teachers
        teaching.caches = [TeacherCache(store, teacher.width)]
        began = time.perf_counter()
        own = view_keys(batch["pixel_values"], batch.get("erasing", ()), ours.grid)
        key_seconds = (time.perf_counter() - began) / len(own)

        def step(keys: list[bytes] | None, learn_only: bool = False) -> float | None:
            ours.batch = batch if keys is None else batch | {"view_keys": keys}
            if learn_only:
                loss = ours.learn().item()
                ours.model.zero_grad(set_to_none=True)
                return loss
            ours.step()
            return None

        plain = step(None, learn_only=True)
        step(own, learn_only=True)  # computes and keeps them
        difference = abs(step(own, learn_only=True) - plain) / abs(plain)
        kept = _copies(store, own, ours.grid, teacher.width)
        turns = iter(range(10**9))

        def cached() -> None:
            first = next(turns) * settings.batch_size % len(kept)
            step((kept + kept)[first : first + settings.batch_size])

        def write() -> None:
            step([secrets.token_bytes(KEY_BYTES) for _ in own])
            store.flush()

        found = teaching.caches[0].found
        seconds = timed_in_turn(
            {"recomputed": lambda: step(None), "cached": cached, "kept": write},
            rounds=settings.rounds,
            warmup=1,
            device=ours.trainer.args.device,
        )
        if teaching.caches[0].found - found != (settings.rounds + 1) * settings.batch_size:
            raise InputError(f"the tokens in '{root}' cannot be read back: check the disk, or give another folder")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    size = token_bytes(ours.grid[0] * ours.grid[1], teacher.width) + KEY_BYTES + 8
    return {
        "speedup": ratio(seconds["recomputed"], seconds["cached"]),
        "step_ms": {name: 1000 * each for name, each in median.items()},
        "pays_after_passes": passes_until_it_pays(**median),
        "bytes_per_view": size,
        "imagenet_gb_per_view": size * IMAGENET / 1e9,
        "read_mb_per_s": size * settings.batch_size / median["cached"] / 1e6,
        "key_ms": 1000 * key_seconds,
        "loss_difference": difference,
    }


def passes_until_it_pays(recomputed: float, cached: float, kept: float) -> int | None:
    """Return the least n with kept + (n - 1)·cached < n·recomputed, seconds of a step each; None if there is none.

    n counts passes over one and the same view. A training of E passes over k views sees each E / k times.
    """
    if cached >= recomputed:
        return None
    return max(1, math.floor((kept - cached) / (recomputed - cached)) + 1)


def table(result: dict[str, Any]) -> str:
    """Return what `measure` returns as lines to read."""
    lines = [f"{f'step, teacher {name}, ms':<28}{each:>12.1f}" for name, each in result["step_ms"].items()]
    size, passes = result["bytes_per_view"], result["pays_after_passes"]
    pays = "it never pays" if passes is None else f"it pays from pass {passes} over a view on"
    disk = ", ".join(f"k = {views}: {views * result['imagenet_gb_per_view']:,.0f} GB" for views in (1, 4, 16))
    return "\n".join(
        [
            *lines,
            f"{result['speedup']:.3f} times the speed with cached tokens; {pays}",
            "a training of E passes over k fixed views sees each view E / k times",
            f"{size / 1e6:.3f} MB a view; of ImageNet's {IMAGENET:,} images with k views {disk}",
            f"the disk must deliver {result['read_mb_per_s']:.1f} MB/s to keep up; a key takes a loader's worker "
            f"{result['key_ms']:.2f} ms",
            f"relative difference of the losses {result['loss_difference']:.1e}",
        ]
    )


def _copies(store: TokenStore, own: list[bytes], grid: tuple[int, int], width: int) -> list[bytes]:
    """Keep the batch's tokens under other keys, too, once or as often as fits into `KEPT_BYTES`; return those.

    At least one of each is kept, whatever the bounds, so that a step finds a whole batch.
    """
    _, tokens = store.read(own, grid[0] * grid[1], width)
    views = max(len(own), min(MOST_VIEWS, KEPT_BYTES // tokens[0].nbytes)) // len(own) * len(own)
    keys = [secrets.token_bytes(KEY_BYTES) for _ in range(views)]
    for number, key in enumerate(keys):
        store.add(key, tokens[number % len(own)].clone())
    store.flush()
    return keys
