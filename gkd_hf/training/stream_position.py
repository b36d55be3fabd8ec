"""Where a run stands in its stream of samples: a part of every checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from gkd_hf.data.rows import ShardRows
from gkd_hf.data.shards import Rows
from gkd_hf.data.streaming import SampleStream
from gkd_hf.errors import InputError


class StreamPosition(TrainerCallback, ExportableState):
    """Counts the samples that the optimiser has seen, and writes them to each checkpoint's trainer state.

    The position tells which sample comes next whatever the batch size and the number of processes, as long as the
    order is the same: so what decides the order is written, too.

    Args:
        stream: what is trained on.
        global_batch_size: samples of one optimiser step, over all processes and accumulation steps.
    """

    def __init__(self, stream: SampleStream, global_batch_size: int):
        self._order = order_facts(stream)
        self._global_batch_size = global_batch_size
        self.start = 0
        self._steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One more batch."""
        self._steps += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as `Trainer` wants it."""
        samples = self.start + self._steps * self._global_batch_size
        return {"args": {}, "attributes": {"samples": samples, "order": self._order}}

    def begin(self, checkpoint: str | os.PathLike | None) -> None:
        """Begin at the position of a checkpoint, or with the first sample.

        Raises:
            InputError: the checkpoint has no position, or was trained in another order.
        """
        self.start = 0 if checkpoint is None else self._position_of(checkpoint)
        self._steps = 0

    def _position_of(self, checkpoint: str | os.PathLike) -> int:
        try:
            state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            found = state["stateful_callbacks"][type(self).__name__]["attributes"]
            samples, order = int(found["samples"]), dict(found["order"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"cannot resume from '{checkpoint}': it does not tell the position in the data, as a stage trained "
                "on a SampleStream does; start again in another output folder"
            ) from error
        for key, now in self._order.items():
            if order.get(key) != now:
                raise InputError(
                    f"cannot resume from '{checkpoint}': {key} was {order.get(key)} and is {now} now, so the samples "
                    "would come in another order; put it back, or start again in another output folder"
                )
        return samples


def order_facts(stream: SampleStream) -> dict[str, Any]:
    """What decides the order of a stream: its seed, its fixed views if it has any and, in their order, its sources.

    Of a source the name, rows (None where unknown), weight and what its shards are: names, sizes of row groups, and
    which rows of them are kept if not all are.
    """
    return {
        "seed": stream.seed,
        "shuffle": stream.shuffle,
        "buffer size": stream.buffer_size,
        "views": stream.views,
        "domains": [
            {"name": each.domain, "rows": each.size, "weight": each.weight, "shards": _digest(each.rows)}
            for each in stream.sources
        ],
    }


def _digest(rows: Rows) -> str | None:
    """Of the shards; None where rows are streamed, whose files nobody has counted."""
    if not isinstance(rows, ShardRows):
        return None
    known = hashlib.sha256()
    for shard in rows.shards:
        known.update(f"{Path(shard.name).name} {shard.num_bytes}\n".encode())
        known.update(shard.group_rows.tobytes())
    if rows.kept is not None:
        known.update(rows.kept.tobytes())
    return known.hexdigest()[:16]
