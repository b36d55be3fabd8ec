"""A teacher's tokens on disk: shards of safetensors, in bf16, found again by the key of the view they are of.

A shard is a safetensors file of three tensors, one row for each view:

    keys       uint8 M×16, see `gkd_hf.data.views.view_keys`
    tokens     bf16  M×(1+N)×C, the class token, then the N patch tokens
    checksums  int64 M, the row's bytes added up as whole numbers

Files are written under another name and renamed, so that none is ever half there, and never changed. Any number of
processes and runs may read and write one folder at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gkd_hf.data.views import KEY_BYTES
from gkd_hf.distillation.token_places import TokenPlaces
from gkd_hf.errors import InputError

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
_OPEN_FILES = 128
_TICK_NANOSECONDS = 50_000_000
_LEFTOVER_SECONDS = 3600  # after which a file under a temporary name belongs to no living process
_TEMPORARY = ".writing-"


def token_bytes(num_patches: int, width: int) -> int:
    """Bytes of one view's tokens on disk: (N + 1)·C of two each; keys and checksums add 24."""
    return 2 * (num_patches + 1) * width


@dataclass(frozen=True, eq=False)
class _Shard:
    """Where a file has what: ``rows`` × (1+N) × ``width`` numbers from byte ``begin`` on, and their checksums."""

    path: Path
    begin: int
    shape: tuple[int, int, int]
    checksums: np.ndarray

    @property
    def row_bytes(self) -> int:
        return 2 * self.shape[1] * self.shape[2]


class TokenStore:
    """The tokens that one teacher gave, in one folder.

    Pickling carries the folder alone; what is unpickled looks at the shards for itself. Memory, in each process
    and each of its loader's workers: 32 bytes for each view that is known, and some 250 for each of the 65,536 (or one
    in 32, if that is more) that came last.

    Args:
        folder: made when the first shard is written.
        writer: told in the names of this process's shards.
        shard_bytes: tokens that are gathered before a shard is written.
    """

    def __init__(self, folder: str | os.PathLike, *, writer: str = "0", shard_bytes: int = SHARD_BYTES):
        self.folder = Path(folder)
        self.writer = writer
        self.shard_bytes = shard_bytes
        self._forget()

    def _forget(self) -> None:
        self._looked_at: int | None = None
        self._known: set[str] = set()
        self._shards: list[_Shard] = []
        self._places = TokenPlaces()
        self._pending: dict[bytes, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "writer": self.writer, "shard_bytes": self.shard_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        """Views that are known."""
        return len(self._places) + len(self._pending)

    def __contains__(self, key: bytes) -> bool:
        return key in self._pending or key in self._places

    @property
    def num_bytes(self) -> int:
        """Of the tokens in the shards that are known."""
        return sum(shard.shape[0] * shard.row_bytes for shard in self._shards)

    # -- reading ------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Find the shards that were written since the last look; one that cannot be used is named in a warning.

        Raises:
            OSError: the folder is there and cannot be read.
        """
        try:
            changed = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed == self._looked_at:
            return
        # Two files may come within one tick of the file system's clock: what has just changed is looked at again.
        settled = time.time_ns() - changed > _TICK_NANOSECONDS
        self._looked_at = changed if settled else None
        with os.scandir(self.folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(".safetensors"))
        for name in names:
            if name not in self._known and not name.startswith(_TEMPORARY):
                self._known.add(name)
                self._include(self.folder / name)

    def _look_again(self) -> None:
        with contextlib.suppress(OSError):  # a folder that is away for once: its views are computed meanwhile
            self.look()

    def _include(self, path: Path) -> None:
        try:
            shard, keys = _described(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._warn(path, f"{type(error).__name__}: {error}")
            return
        number = len(self._shards)
        self._shards.append(shard)
        # The first shard that has a view keeps it, so that every process reads the same numbers.
        self._places.add(keys, number)

    def _warn(self, path: Path, why: str) -> None:
        logger.warning("%s is damaged (%s): its tokens are computed again. Remove the file.", path, why[:200])

    def read(
        self, keys: Sequence[bytes], num_patches: int, width: int, pin: bool = False
    ) -> tuple[list[bool], torch.Tensor]:
        """Read the tokens of several views.

        Args:
            keys: B of them. num_patches: N. width: C. pin: into pinned memory, for a GPU.

        Returns:
            A list of B, whether the view was found, and bf16 B×(1+N)×C, class tokens first; rows that were not found
            hold no meaning.
        """
        if any(key not in self for key in keys):
            self._look_again()
        tokens = torch.empty(len(keys), 1 + num_patches, width, dtype=torch.bfloat16, pin_memory=pin)
        found = [self._fill(tokens[number], key) for number, key in enumerate(keys)]
        return found, tokens

    def _fill(self, out: torch.Tensor, key: bytes) -> bool:
        if key in self._pending:
            out.copy_(self._pending[key])
            return True
        place = self._places.get(key)
        if place is None:
            return False
        number, row = place
        shard = self._shards[number]
        if shard.shape[1:] != tuple(out.shape):
            return False
        data = memoryview(out.view(torch.uint8).numpy()).cast("B")
        try:
            count = os.preadv(self._file(number), [data], shard.begin + row * shard.row_bytes)
            if count != shard.row_bytes:
                raise OSError("the file has become shorter")
            if _checksum(out) != shard.checksums[row]:
                raise OSError(f"the checksum of row {row} is wrong")
        except OSError as error:
            self._drop(number, str(error))
            return False
        return True

    def prefetch(self, keys: Sequence[bytes]) -> None:
        """Ask the system to read the tokens of these views into its memory, and do not wait for it."""
        if any(key not in self for key in keys):
            self._look_again()
        for key in keys:
            place = self._places.get(key)
            if place is not None and sys.platform == "linux":
                number, row = place
                shard = self._shards[number]
                with contextlib.suppress(OSError):  # who reads them tells what is wrong
                    begin = shard.begin + row * shard.row_bytes
                    os.posix_fadvise(self._file(number), begin, shard.row_bytes, os.POSIX_FADV_WILLNEED)

    def _file(self, number: int) -> int:
        if self._process != os.getpid():  # `pread` leaves a shared position alone, but closing is for whoever opened
            self._files, self._process = OrderedDict(), os.getpid()
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        self._files[number] = os.open(self._shards[number].path, os.O_RDONLY | os.O_CLOEXEC)
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[number]

    def _drop(self, number: int, why: str) -> None:
        """Use a shard no more: what is damaged in one place is not to be trusted in another."""
        self._warn(self._shards[number].path, why)
        self._places.drop(number)

    # -- writing ------------------------------------------------------------------------------------------------------

    def add(self, key: bytes, tokens: torch.Tensor) -> None:
        """Keep the tokens of a view, bf16 (1+N)×C on the CPU; a view that is known stays as it is.

        Raises:
            InputError: a shard is full and cannot be written.
        """
        if key in self:
            return
        self._pending[key] = tokens
        self._pending_bytes += tokens.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last time.

        Raises:
            InputError: the folder cannot be written, for example because the disk is full.
        """
        for shape in dict.fromkeys(tokens.shape for tokens in self._pending.values()):
            self._write({key: tokens for key, tokens in self._pending.items() if tokens.shape == shape})
        self._pending, self._pending_bytes = {}, 0

    def discard(self) -> None:
        """Forget what was added since the last time that it was written."""
        self._pending, self._pending_bytes = {}, 0

    def write_text(self, name: str, text: str) -> None:
        """Write a text file beside the shards, under its name once it is whole.

        Raises:
            InputError: as `flush`.
        """
        self._put(name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _write(self, views: dict[bytes, torch.Tensor]) -> None:
        rows = torch.stack(list(views.values()))
        keys = torch.frombuffer(bytearray(b"".join(views)), dtype=torch.uint8).view(len(views), KEY_BYTES)
        checksums = torch.tensor([_checksum(row) for row in rows], dtype=torch.int64)
        name = f"tokens-{self.writer}-{secrets.token_hex(8)}.safetensors"
        tensors = {"keys": keys, "tokens": rows, "checksums": checksums}
        self._put(name, lambda temporary: save_file(tensors, temporary))
        self._known.add(name)
        self._include(self.folder / name)

    def _put(self, name: str, write: Callable[[Path], Any]) -> None:
        # Processes on several hosts may place a file of one name at once: each writes its own.
        temporary = self.folder / f"{_TEMPORARY}{secrets.token_hex(8)}-{name}"
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, self.folder / name)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise InputError(
                f"the teacher cache cannot be written to '{self.folder}' ({' '.join(reason.split())[:200]}): make "
                "room there, give another folder, or leave teacher_cache out; the tokens that are there stay of use"
            ) from error

    def clear_leftovers(self) -> None:
        """Remove what processes that were killed an hour ago or earlier were writing."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()


def _described(path: Path) -> tuple[_Shard, bytes]:
    """Read a shard's header, keys and checksums; raises one of several errors where they are not as they should be."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 0 < length <= size - 8:
            raise ValueError("its header is torn")
        header = json.loads(file.read(length))
        first = 8 + length
        entries = {name: header[name] for name in ("keys", "tokens", "checksums")}
        if first + max(entry["data_offsets"][1] for entry in entries.values()) != size:
            raise ValueError(f"it has {size} bytes, and its header tells of others")
        count, tokens, width = entries["tokens"]["shape"]
        begin, end = entries["tokens"]["data_offsets"]
        keys, checksums = (_small(file, first, entries[name]) for name in ("keys", "checksums"))
    kinds = [entries[name]["dtype"] for name in ("keys", "tokens", "checksums")]
    expected = [count * KEY_BYTES, 2 * count * tokens * width, 8 * count]
    if kinds != ["U8", "BF16", "I64"] or [len(keys), end - begin, len(checksums)] != expected:
        raise ValueError("its tensors are not those of a teacher cache")
    shard = _Shard(path, first + begin, (count, tokens, width), np.frombuffer(checksums, dtype="<i8"))
    return shard, keys


def _small(file: Any, first: int, entry: dict[str, Any]) -> bytes:
    begin, end = entry["data_offsets"]
    file.seek(first + begin)
    return file.read(end - begin)


def _checksum(tokens: torch.Tensor) -> int:
    """Add up a tensor's bytes as numbers of eight, or of two where they are no multiple of eight, wrapping around."""
    flat = tokens.contiguous().view(-1)
    # Eight at a time is twenty times as fast as a CRC; zeroed, torn and flipped bytes are found all the same.
    return int(flat.view(torch.int16 if flat.nbytes % 8 else torch.int64).sum(dtype=torch.int64))
