"""A label fraction that leaves a class without pixels is told before the run begins: nobody could learn that class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from gkd_hf.data.row_decoder import RowDecoder
from gkd_hf.errors import InputError
from gkd_hf.training.label_check import LabelledSplit, remember, remembered
from gkd_hf.training.progress import no_bar


@dataclass(frozen=True)
class DividedSplit:
    """A training split by its label fraction: the rows that are trained on, and those left out, if there are any."""

    kept: LabelledSplit
    left_out: LabelledSplit | None


def check_classes(
    divided: Sequence[DividedSplit], classes: Sequence[str], fraction: float, seed: int, memory: Path
) -> None:
    """Check that the kept rows of all splits together have pixels of every class that the splits have.

    Labels are read until every class was met, which few images do; of the rows left out, those that it takes to find
    the classes that the kept ones lack: all of them only for a class that nobody has.

    Args:
        divided: the domains that are mixed, or the one.
        classes: names by train id.
        fraction: of the labels. seed: which rows they are.
        memory: JSON file that is shared with `check_labels`; what was checked is not read again.

    Raises:
        InputError: a class has pixels in rows that are left out, and none in those that are kept.
    """
    left_out = [split.left_out for split in divided if split.left_out is not None]
    if not left_out:
        return
    names = "+".join(split.kept.domain for split in divided)
    key = f"classes of {names}"
    facts = {"classes": list(classes), "splits": [split.kept.facts() for split in divided]}
    if remembered(memory).get(key) == facts:
        return
    kept = sum(split.kept.num_rows for split in divided)
    total = kept + sum(split.num_rows for split in left_out)
    with tqdm(total=total, desc="looking for every class", unit="image", disable=no_bar()) as bar:
        missing = _without_pixels((split.kept for split in divided), frozenset(range(len(classes))), bar)
        nowhere = _without_pixels(left_out, missing, bar)
    lost = [classes[number] for number in sorted(missing - nowhere)]
    if lost:
        raise InputError(
            f"stages.task.label_fraction {fraction:g} with label_seed {seed} keeps {kept:,} of the {total:,} images "
            f"of {names}, and none of these has a pixel of: {', '.join(lost)}; give a larger label_fraction, or "
            "another label_seed"
        )
    remember(memory, key, facts)


def _without_pixels(splits: Iterable[LabelledSplit], wanted: frozenset[int], bar: tqdm) -> frozenset[int]:
    """Return those of the train ids that no label has."""
    for split in splits:
        if not wanted:
            break
        with contextlib.closing(split.look(RowDecoder.classes)) as answers:
            for _, _, found in answers:
                bar.update()
                wanted -= found
                if not wanted:
                    break
    return wanted
