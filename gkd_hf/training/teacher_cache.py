"""Teacher features once: a training's teachers, asked about a fixed view the first time that it is seen only.

An entry belongs to one image, one view and one teacher. The teacher, and all of the training that decides its numbers,
is the folder; image and view are the key, a digest of the very pixels (`gkd_hf.data.views.view_keys`). So tokens can
never be taken for those of another view, size, seed or teacher: what has changed in any way is missing, and computed.

Tokens are used in the 16 bits in which they are kept, also when they have just been computed: a training that finds
them all and one that computes them all get the same numbers, bit for bit. A batch of which any view is missing goes
through the teacher whole, and only what is missing is taken from that, because the last bit of a token may hang on the
size of the batch that it was computed in. So one process gives the same numbers again after a restart, too. Several
processes that share a cache may meet a view between its computation and the writing of its shard; then it is computed
again, in another batch, and may differ in the last of its 16 bits. So may what a full disk left no room for.

A cache can never end a training that has begun: what cannot be written is told once, and nothing more is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState

from gkd_hf.data.streaming import SampleStream
from gkd_hf.data.views import view_keys
from gkd_hf.distillation.token_store import TokenStore
from gkd_hf.errors import InputError
from gkd_hf.models.encoders import EncoderOutput
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.arguments import GKDDistillationArguments

logger = logging.getLogger(__name__)

FORMAT = 1  # of keys and shards: another one is another cache
# They name or date a configuration and change nothing that it computes.
_NAMES = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id")


def teacher_identity(
    teacher: GKDTeacher, args: GKDDistillationArguments, image_mean: torch.Tensor, image_std: torch.Tensor
) -> dict[str, Any]:
    """Return what, besides the pixels, decides a teacher's tokens, as plain values.

    Weights by their digest, in the precision in which they are held; configuration, geometry, both normalisations;
    precision, TF32, kind of device (the noise of erased pixels differs between them) and compilation of the training;
    attention implementation and the versions of torch and transformers, which round in their own ways. The model of
    the GPU is not in it: another one may differ in the last bits.

    Args:
        teacher: as the training has prepared it.
        args: of the training.
        image_mean, image_std: 1×3×1×1, the student's, in which the teacher is shown the pixels.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(teacher.encoder.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = {key: value for key, value in teacher.encoder.config.to_dict().items() if key not in _NAMES}
    return {
        "format": FORMAT,
        "weights": weights.hexdigest(),
        "config": json.loads(json.dumps(config, default=str)),
        "geometry": teacher.geometry,
        "normalisation": [
            each.flatten().tolist() for each in (teacher.image_mean, teacher.image_std, image_mean, image_std)
        ],
        "precision": "bf16" if args.bf16 else "fp32",
        "device": args.device.type,
        "compiled": args.torch_compile,
        "tf32": args.tf32,
        "attention": teacher.encoder.config._attn_implementation,
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }


def cache_folder(root: str | os.PathLike, teacher: GKDTeacher, identity: dict[str, Any]) -> Path:
    """The folder of a teacher's tokens: what it is called, for people, and a digest of its identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    called = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(teacher.called).name).strip("._") or "teacher"
    return Path(os.path.expanduser(root)) / f"{called}-{digest}"


class TeacherCache:
    """One teacher's tokens: from disk where the view was seen before, else computed, and kept.

    Args:
        store: of this teacher, see `cache_folder`.
        width: channels C of its tokens.

    Attributes:
        seen, found: views that were asked for, and how many of them were there.
        keeping: whether tokens that were computed are kept; no more once they could not be written.
    """

    def __init__(self, store: TokenStore, width: int):
        self.store = store
        self.width = width
        self.seen = self.found = 0
        self.keeping = True

    def __call__(
        self,
        keys: Sequence[bytes],
        grid: tuple[int, int],
        device: torch.device,
        compute: Callable[[], EncoderOutput],
    ) -> EncoderOutput:
        """Return the tokens of a batch's B views, in bf16 numbers as fp32: cls B×C and patches B×(h·w)×C.

        Args:
            keys: of the views. grid: (h, w). device: where the tokens are wanted.
            compute: asks the teacher about the whole batch; called if any view is missing.
        """
        wanted = (keys, grid[0] * grid[1], self.width)
        pin = device.type == "cuda"
        found, tokens = self.store.read(*wanted, pin=pin)
        self.seen += len(found)
        self.found += sum(found)
        if not all(found):
            given = compute()
            fresh = torch.cat([given.cls[:, None], given.patches], dim=1).to(torch.bfloat16).cpu()
            for key, known, row in zip(keys, found, fresh, strict=True):
                if not known and row.isfinite().all():  # a teacher that overflowed once must not do so for ever
                    self._keep(key, row)
            # Read back, so that a view that is in the batch twice has one value, as it will have next time.
            found, tokens = self.store.read(*wanted, pin=pin)
            for number, known in enumerate(found):
                if not known:
                    tokens[number] = fresh[number]
        tokens = tokens.to(device, non_blocking=True)
        return EncoderOutput(tokens[:, 0].float(), tokens[:, 1:].float(), grid)

    def flush(self) -> None:
        """Write what was computed; if that fails, warn, and keep nothing more."""
        try:
            self.store.flush()
        except InputError as error:
            self.stop_keeping(str(error))

    def stop_keeping(self, why: str) -> None:
        """Warn once, forget what is not written yet, and read only from now on."""
        if self.keeping:
            logger.warning("%s. The training goes on and keeps no more tokens.", why)
        self.keeping = False
        self.store.discard()

    def _keep(self, key: bytes, row: torch.Tensor) -> None:
        if not self.keeping:
            return
        try:
            self.store.add(key, row.clone())
        except InputError as error:
            self.stop_keeping(str(error))


def teacher_caches(
    teachers: Sequence[GKDTeacher],
    args: GKDDistillationArguments,
    image_mean: torch.Tensor,
    image_std: torch.Tensor,
) -> list[TeacherCache]:
    """Return a cache for each of a training's teachers under ``args.teacher_cache``, its identity written beside it.

    A folder that is there and cannot be written is read all the same.

    Raises:
        InputError: the folder cannot be made, or not be read.
    """
    caches = []
    for teacher in teachers:
        identity = teacher_identity(teacher, args, image_mean, image_std)
        folder = cache_folder(args.teacher_cache, teacher, identity)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            store = TokenStore(folder, writer=str(args.process_index))
            store.clear_leftovers()
            store.look()
        except OSError as error:
            raise InputError(
                f"the teacher cache '{folder}' can neither be made nor read ({error.strerror}): give a folder that "
                "can be, or leave teacher_cache out"
            ) from error
        cache = TeacherCache(store, teacher.width)
        if not (folder / "identity.json").exists():
            try:
                store.write_text("identity.json", json.dumps({"teacher": teacher.called} | identity, indent=2) + "\n")
            except InputError as error:
                cache.stop_keeping(str(error))
        caches.append(cache)
    return caches


def check_views(dataset: torch.utils.data.Dataset) -> None:
    """Raise `InputError` for a stream of which no view comes back, so that a cache of them would never be of use."""
    if isinstance(dataset, SampleStream) and dataset.views is None:
        raise InputError(
            "teacher_cache keeps the teacher's tokens of fixed views, and this stream shows a new view each time: "
            "give it views, for example 4, or leave teacher_cache out"
        )


class CachingCollator:
    """Adds to a batch the keys of its views, and lets the system read ahead what is kept of them.

    It runs in the loader's workers, so the tokens are in memory when the training asks for them.

    Args:
        collate: gives the batch, with pixel_values, grid and, if pixels are erased on the device, erasing.
        stores: of the teachers' tokens.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], stores: Sequence[TokenStore]):
        self.collate = collate
        self.stores = tuple(stores)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch with view_keys, one of 16 bytes for each sample."""
        batch = self.collate(samples)
        keys = view_keys(batch["pixel_values"], batch.get("erasing", ()), batch["grid"])
        for store in self.stores:
            store.prefetch(keys)
        return batch | {"view_keys": keys}


class CacheKeeper(TrainerCallback):
    """Writes what was computed before each checkpoint and at the end, so that a training that goes on finds it.

    A write that fails stops neither checkpoint nor training, see `TeacherCache.flush`.
    """

    def __init__(self, caches: Sequence[TeacherCache]):
        self.caches = tuple(caches)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write, if a checkpoint comes next."""
        if control.should_save:
            self._flush()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write, if a checkpoint comes next."""
        if control.should_save:
            self._flush()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Write what is left."""
        self._flush()

    def _flush(self) -> None:
        for cache in self.caches:
            cache.flush()

    def told(self) -> str:
        """What the caches were good for, in one line."""
        seen, found = (sum(counts) for counts in zip(*((each.seen, each.found) for each in self.caches), strict=True))
        size = sum(cache.store.num_bytes for cache in self.caches)
        return (
            f"teacher cache: {found} of {seen} views were there; it holds {size / 1e9:.3g} GB in "
            f"{', '.join(str(cache.store.folder) for cache in self.caches)}"
        )
