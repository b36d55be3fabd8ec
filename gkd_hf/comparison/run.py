"""A comparison from beginning to end: its runs, and after each of them the results so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gkd_hf.comparison.cells import Cell, values_text
from gkd_hf.comparison.check import check_against, read_stored
from gkd_hf.comparison.definition import Comparison
from gkd_hf.comparison.figure import draw_comparison
from gkd_hf.comparison.places import Places, render_data
from gkd_hf.comparison.results import collect, write_json
from gkd_hf.comparison.schedule import Schedule, figures
from gkd_hf.comparison.table import markdown, terminal_table
from gkd_hf.errors import InputError, nearest
from gkd_hf.evaluation.report_text import write_whole
from gkd_hf.training.checks import check_output_dir, lock_output_dir
from gkd_hf.training.progress import bars_are_seen


def select(comparison: Comparison, only: Sequence[str] | None, seeds: Sequence[str] | None) -> Schedule:
    """The runs of some variants and seeds, or of all.

    Raises:
        InputError: the comparison has no such variant or seed.
    """
    for name in only or ():
        if name not in comparison.variants:
            known = ", ".join(comparison.variants)
            raise InputError(f"--only: no variant '{name}'{nearest(name, comparison.variants)} (there are: {known})")
    for seed in seeds or ():
        if seed not in map(str, comparison.seeds):
            known = ", ".join(map(str, comparison.seeds))
            raise InputError(
                f"--seeds: the comparison has no seed {seed} (it has: {known}): add it to {comparison.path}"
            )
    # In the file's order, each once.
    names = [name for name in comparison.variants if not only or name in only]
    return Schedule(comparison, names, [seed for seed in comparison.seeds if not seeds or str(seed) in seeds])


def plan(schedule: Schedule) -> str:
    """What would be run, what is finished, and what is chosen how, as text."""
    comparison = schedule.comparison
    lines = [f"{schedule.total()} runs in {comparison.output_dir}, {schedule.finished()} finished"]
    for name, variant in comparison.variants.items():
        trials, seeds = schedule.trials.get(name, []), schedule.runs.get(name, ())
        if not trials and not seeds:
            continue
        lines.append(f"{name}" + (f" ({variant.title})" if variant.title != name else ""))
        lines += [f"  tuning {values_text(cell.tuned)}: {_standing(schedule, cell)}" for cell in trials]
        tuner, choice = comparison.tuner(variant), schedule.choice(variant)
        if seeds and tuner is not None:
            applied = f"by tuning '{tuner.name}'"
            if choice is not None:
                applied = values_text(schedule.finals(name)[0].applied) or f"those of {tuner.name} do not apply"
            lines.append(f"  hyper-parameters: {applied}")
        if seeds and variant.start_from is not None:
            lines.append(f"  starts from the encoder of {variant.start_from}, same seed")
        finals = {cell.seed: cell for cell in schedule.finals(name)}
        lines += [
            f"  seed {seed}: {_standing(schedule, finals[seed]) if seed in finals else 'to run after the tuning'}"
            for seed in seeds
        ]
    return "\n".join(lines)


def _standing(schedule: Schedule, cell: Cell) -> str:
    result = schedule.result(cell)
    if result is not None:
        return f"finished, {figures(result)}"
    if cell.trial and cell.diverged:
        return f"diverged; remove {cell.folder} to try it again"
    done = [name for name, folder in cell.stages.items() if folder.finished]
    return f"to run, finished stages: {', '.join(done)}" if done else "to run"


def run_comparison(schedule: Schedule, jobs: int | None, command: Sequence[str], stored: str | None) -> int:
    """Run what is missing; write and print the results.

    Args:
        schedule: the runs that are wanted.
        jobs: how many at once; None: as many as there are GPUs, else cores.
        command: what was typed.
        stored: path of results to check against.

    Returns:
        The exit code: 1 where a run failed or results are not within the spread of the stored ones.

    Raises:
        InputError: a run was begun with other settings, data cannot be rendered, another comparison is going on.
    """
    comparison = schedule.comparison
    known = read_stored(stored) if stored is not None else None
    check_output_dir(comparison.output_dir)
    schedule.check()
    places = Places.here(jobs)
    with lock_output_dir(comparison.output_dir):
        tell(f"{schedule.total()} runs, {schedule.finished()} finished before; {places.jobs} at once")
        render_data(comparison, schedule.runs, progress=bars_are_seen())
        everything = select(comparison, None, None)
        schedule.run(places, tell, lambda: write(everything, command))
        results = write(everything, command)
    print(f"\n{terminal_table(results)}\n\nresults.md, results.png and results.json are in {comparison.output_dir}")
    code = 0
    if left := schedule.total() - schedule.finished():
        tell(f"{left} runs are missing, {len(schedule.failed)} failed: the same command goes on with them")
        code = 1
    if known is not None:
        names = None if set(schedule.names) == set(comparison.variants) else schedule.names
        seeds = None if set(schedule.seeds) == set(comparison.seeds) else schedule.seeds
        table, within = check_against(results, known, names, seeds)
        print(f"\n{table}", flush=True)
        code = code if within else 1
    return code


def write(everything: Schedule, command: Sequence[str]) -> dict[str, Any]:
    """Write what is known so far of all runs: results.png, results.md and, last, results.json; return the latter."""
    results = collect(everything, command)
    folder = everything.comparison.output_dir
    write_whole(folder / "results.png", lambda place: draw_comparison(place, results))
    write_whole(folder / "results.md", lambda place: place.write_text(markdown(results), encoding="utf-8"))
    write_json(folder / "results.json", results)
    return results


def tell(line: str) -> None:
    """Print a line of progress."""
    print(line, flush=True)
