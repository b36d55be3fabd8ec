"""Runs of a comparison, several at once, each in a process of its own, none training what another one trains."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gkd_hf.comparison.cells import Cell, Choice, choose, source_miou, trials
from gkd_hf.comparison.definition import Comparison, Variant
from gkd_hf.comparison.places import Places, Process, is_held, start
from gkd_hf.errors import NOT_FINITE, InputError
from gkd_hf.evaluation.report_text import percent
from gkd_hf.training.sigterm import Preempted

PATIENCE = 120.0  # seconds that children have to save and end
POLL = 0.3  # seconds


@dataclass
class _Running:
    cell: Cell
    process: Process
    place: int
    began: float


class Schedule:
    """Brings the runs of a comparison to their end.

    Args:
        comparison: what is compared.
        names: the variants that are wanted; what they need of others is run as well.
        seeds: those that are wanted.

    Attributes:
        names, seeds: as given.
        failed: folder → why, of the runs that were tried this time and failed.
    """

    def __init__(self, comparison: Comparison, names: Iterable[str], seeds: Iterable[int]) -> None:
        self.comparison = comparison
        self.names, self.seeds = tuple(names), tuple(seeds)
        self.runs = comparison.runs(self.names, self.seeds)
        tuners = [comparison.tuner(comparison.variants[name]) for name in self.runs]
        self.trials = {
            variant.name: trials(comparison, variant)
            for variant in comparison.variants.values()
            if variant.tune and variant in tuners
        }
        self.failed: dict[Path, str] = {}
        self._results: dict[Path, dict[str, Any] | None] = {}
        self._finals: dict[str, list[Cell]] = {}
        self._digests: dict[Path, str] = {}
        self._running: list[_Running] = []
        self._held: dict[Path, Cell] = {}
        self._signal: int | None = None

    def choice(self, variant: Variant) -> Choice | None:
        """What was chosen for a variant; None if it is not known yet, or nothing is tuned."""
        tuner = self.comparison.tuner(variant)
        if tuner is None:
            return None
        cells = self.trials[tuner.name]
        if not all(self.is_done(cell) or cell.diverged for cell in cells):
            return None
        results = [self.result(cell) for cell in cells]
        return choose([(c.tuned, r and source_miou(r)) for c, r in zip(cells, results, strict=True)])

    def known(self) -> list[Cell]:
        """Every run of which it is known how it is to be made, candidates of tunings first."""
        found = [cell for cells in self.trials.values() for cell in cells]
        for name in self.runs:
            found += self.finals(name)
        return found

    def finals(self, name: str) -> list[Cell]:
        """A variant's runs of the wanted seeds; none while its hyper-parameters are not chosen."""
        if name not in self._finals:
            variant = self.comparison.variants[name]
            choice = self.choice(variant)
            if choice is None and self.comparison.tuner(variant) is not None:
                return []
            values = {} if choice is None else choice.values
            self._finals[name] = [Cell(self.comparison, variant, seed, values) for seed in self.runs[name]]
        return self._finals[name]

    def total(self) -> int:
        """The number of runs, those of which it is not known yet how they are to be made included."""
        return sum(map(len, [*self.runs.values(), *self.trials.values()]))

    def finished(self) -> int:
        """How many of them are finished; of candidates also those whose loss did not stay finite."""
        return sum(self.is_done(cell) or (cell.trial and cell.diverged) for cell in self.known())

    def start_of(self, cell: Cell) -> Cell | None:
        """The run whose encoder a run starts from; None if from none, or that one's hyper-parameters are open."""
        finals = [] if cell.variant.start_from is None else self.finals(cell.variant.start_from)
        return next((each for each in finals if each.seed == cell.seed), None)

    def origin(self, cell: Cell) -> str | None:
        """`Cell.digest` of the run that a run starts from; "" if from none, None if it is not known yet."""
        if cell.variant.start_from is None:
            return ""
        begins = self.start_of(cell)
        before = None if begins is None else self.origin(begins)
        if before is None:
            return None
        if begins.folder not in self._digests:
            self._digests[begins.folder] = begins.digest(before)
        return self._digests[begins.folder]

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The report of a run; None if it is not finished, or it is open what it is to start from."""
        if cell.folder not in self._results:
            origin = self.origin(cell)
            if origin is None:
                return None
            self._results[cell.folder] = cell.result(origin)
        return self._results[cell.folder]

    def is_done(self, cell: Cell) -> bool:
        """Whether a run is finished."""
        return self.result(cell) is not None

    def look_again(self) -> None:
        """Forget what was not finished when it was last looked for."""
        self._results = {folder: result for folder, result in self._results.items() if result is not None}

    def is_settled(self, cell: Cell) -> bool:
        """Whether a run is finished or cannot be."""
        return self.is_done(cell) or cell.folder in self.failed or (cell.trial and cell.diverged)

    def check(self) -> None:
        """Raise `InputError` if a run that is not finished was begun with other settings, as `Cell.check`."""
        for cell in self.known():
            if not self.is_done(cell):
                cell.check(self.origin(cell))

    def run(
        self,
        places: Places,
        tell: Callable[[str], None],
        finished: Callable[[], None],
        start: Callable[[Cell, dict[str, str]], Process] = start,
    ) -> None:
        """Run all that is not finished; return when nothing more can be run.

        A run that was begun with other settings, as it can turn out when hyper-parameters are chosen, has failed.

        Args:
            places: where runs can be at once.
            tell: prints a line of progress.
            finished: called after every finished run.
            start: starts a run in an environment.

        Raises:
            Preempted, KeyboardInterrupt: after the runs have ended, for SIGTERM and Ctrl-C.
        """
        for cell in self.known():
            # Runs of an earlier version of this program have no record yet.
            begins = self.start_of(cell)
            if begins is not None and self.is_done(begins) and self.is_done(cell):
                cell.remember_origin(self.origin(cell))
        handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._signal is None:
                self._collect(tell, finished)
                self._look_at_held(tell, finished)
                self._fill(places, tell, start)
                if not self._running and not self._held:
                    break
                time.sleep(POLL)
        finally:
            stopped_by = self._signal
            self._end_children(tell)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if stopped_by == signal.SIGTERM:
            tell("SIGTERM: ended; the same command goes on where this comparison stood")
        if stopped_by is not None:
            raise Preempted if stopped_by == signal.SIGTERM else KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _fill(
        self, places: Places, tell: Callable[[str], None], start: Callable[[Cell, dict[str, str]], Process]
    ) -> None:
        running = {each.cell.folder for each in self._running}
        for cell in self.known():
            if len(self._running) + len(self._held) >= places.jobs or self._signal is not None:
                return
            if cell.folder in running or cell.folder in self._held or self.is_settled(cell):
                continue
            try:
                if self._must_wait(cell):
                    continue
                if is_held(cell):
                    self._held[cell.folder] = cell
                    tell(f"{cell.label}: another program is running it in {cell.folder}; waiting for its end")
                    continue
                taken = cell.prepare(self.origin(cell))
            except InputError as error:
                self.failed[cell.folder] = str(error)
                tell(f"{cell.label}: failed: {str(error).removeprefix(f'{cell.label}: ')}")
                continue
            place = min(set(range(places.jobs)) - {each.place for each in self._running})
            self._running.append(_Running(cell, start(cell, places.environment(place)), place, time.monotonic()))
            note = f" ({', '.join(taken)}: as another run has trained it)" if taken else ""
            tell(f"{cell.label}: started{note}")

    def _must_wait(self, cell: Cell) -> bool:
        if cell.variant.start_from is not None:
            begins = self.start_of(cell)
            if begins is None or not self.is_done(begins):
                return True
        # A stage is trained by one run at a time; the others take it over.
        missing = cell.missing()
        going_on = [*(each.cell for each in self._running), *self._held.values()]
        return any(missing & other.missing() for other in going_on)

    def _look_at_held(self, tell: Callable[[str], None], finished: Callable[[], None]) -> None:
        """Runs that outlived the program that started them: they are waited for, and go on from here if need be."""
        for cell in list(self._held.values()):
            if is_held(cell):
                continue
            del self._held[cell.folder]
            self._results.pop(cell.folder, None)
            result = self.result(cell)
            if result is not None:
                tell(f"{cell.label}: {figures(result)}")
                finished()

    def _collect(self, tell: Callable[[str], None], finished: Callable[[], None]) -> None:
        for each in list(self._running):
            code = each.process.poll()
            if code is None:
                continue
            self._running.remove(each)
            cell, minutes = each.cell, (time.monotonic() - each.began) / 60
            self._results.pop(cell.folder, None)
            result = self.result(cell)
            if result is not None:
                left = self.total() - self.finished() - len(self.failed)
                tell(f"{cell.label}: {figures(result)}, {minutes:.1f} min, {left} left")
                finished()
                continue
            why = " ".join(cell.last_words().split())
            if cell.trial and code == NOT_FINITE:
                cell.give_up(why)
                tell(f"{cell.label}: passed over, {why.removeprefix('error: ')}")
                continue
            self.failed[cell.folder] = why
            tell(f"{cell.label}: failed (exit code {code}, {cell.log}): {why}")

    def _end_children(self, tell: Callable[[str], None]) -> None:
        if not self._running:
            return
        tell(f"ending {len(self._running)} run(s), which save what they need to go on")
        for each in self._running:
            each.process.terminate()
        until, self._signal = time.monotonic() + PATIENCE, None
        for each in self._running:
            while each.process.poll() is None:
                if time.monotonic() > until or self._signal is not None:  # asked a second time
                    os.killpg(each.process.pid, signal.SIGKILL)  # with the workers that outlive SIGTERM
                    each.process.wait()
                    break
                time.sleep(POLL)
        self._running.clear()


def figures(result: dict[str, Any]) -> str:
    """The figures of a finished run in a few words."""
    words = []
    if (source := source_miou(result)) is not None:
        words.append(f"source {percent(source)}")
    if (mean := result.get("mean_target_miou")) is not None:
        words.append(f"mean of unseen {percent(mean)}")
    return ", ".join(words) or "done"
