"""Which tensors are alive while a step runs, by what they are for, and how much they were at their most."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# These copy what is not contiguous, and keep the copies while they run, on the CPU and on the GPU.
_COPYING = (_aten._softmax, _aten._log_softmax, _aten._softmax_backward_data, _aten._log_softmax_backward_data)


class LiveMemory(TorchDispatchMode):
    """Follow the storages that torch operations make until nothing refers to them any more.

    It sees real and fake tensors alike. What an operation takes and gives back inside itself (a convolution's
    workspace) is not seen, except for the contiguous copies that softmax and log_softmax make.

    Args:
        parts: what is recorded after every operation of a phase, in this order.

    Attributes:
        part: what new storages are for, until `claim` says otherwise.
        live: bytes alive now, by part. history: phase → the bytes of the recorded parts at its moments, in order.
        flops: floating-point operations of matrix products, convolutions and attention, by torch's own formulas.
            (Its `FlopCounterMode` holds on to what activation checkpointing recomputes.)
    """

    def __init__(self, parts: tuple[str, ...]):
        super().__init__()
        self.parts = parts
        self.part = parts[0]
        self.flops = 0
        self.live: dict[str, int] = {}
        self.history: dict[str, list[tuple[int, ...]]] = {}
        self._phase: str | None = None
        self._storages: dict[int, tuple[str, int]] = {}
        self._weights: set[int] = set()

    @contextmanager
    def phase(self, name: str, part: str) -> Iterator[None]:
        """Record what runs in this context under ``name``; its new storages are for ``part``."""
        before, self._phase, self.part = (self._phase, self.part), name, part
        self._record()
        try:
            yield
        finally:
            self._phase, self.part = before

    def claim(self, tensors: Iterable[torch.Tensor], part: str, *, weights: bool = False) -> None:
        """Say what tensors are for. Of ``weights``, copies in a lower precision are "weight copies" from now on."""
        for tensor in tensors:
            key = self._follow(tensor.untyped_storage())
            self._move(key, part)
            if weights:
                self._weights.add(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out  # asks for a property, and how often depends on what was asked before
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        is_copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                key = self._follow(tensor.untyped_storage())
                if is_copy:
                    self._move(key, "weight copies")
        self._record(_copied(args) if func._overloadpacket in _COPYING else 0)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key not in self._storages:
            size = storage.nbytes()
            self._storages[key] = (self.part, size)
            self.live[self.part] = self.live.get(self.part, 0) + size
            weakref.finalize(storage, self._forget, key).atexit = False
        return key

    def _forget(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.live[part] -= size
        self._weights.discard(key)

    def _move(self, key: int, part: str) -> None:
        old, size = self._storages[key]
        self._storages[key] = (part, size)
        self.live[old] -= size
        self.live[part] = self.live.get(part, 0) + size

    def _record(self, passing: int = 0) -> None:
        """Note what is alive, and ``passing`` bytes of the present part, which are gone after this moment."""
        if self._phase is not None:
            moment = tuple(self.live.get(part, 0) + passing * (part == self.part) for part in self.parts)
            self.history.setdefault(self._phase, []).append(moment)


def _copied(tensors: Iterable[Any]) -> int:
    """Bytes of contiguous copies of those tensors that are not contiguous."""
    spread = (each for each in tensors if isinstance(each, torch.Tensor) and not each.is_contiguous())
    return sum(each.numel() * each.element_size() for each in spread)
