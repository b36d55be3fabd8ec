"""Kill a random process of a recipe's run at random moments, start it again, and see that nothing is lost.

python tests/distributed/fault_campaign.py --kills 50 --processes 2 --seed 0 --folder OUT

The recipe has all three stages. It is run undisturbed, and once more with SIGKILLs: while it starts, trains, saves a
checkpoint or writes a model, and evaluates. The same command goes on each time. In the end every model, every file of
heads and the report must be equal bit by bit. After each kill the newest checkpoint must be whole and at least as new
as the newest that stood there before, and the next start must go on from it. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from gkd_hf.training.checkpoints import standing
from tests.cli.test_kill_and_resume import STAGES, write_recipe
from tests.distributed.launched import Launched

SAVE_STEPS = 2
SHARES = {"saving": 0.5, "training": 0.25, "start": 0.25}  # of the kills in a stage
SAVING = "saving a checkpoint"
LATE = 0.16  # of all kills, for what comes after the stages


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    restarts: int = 0
    by_stage: Counter[str] = field(default_factory=Counter)
    by_moment: Counter[str] = field(default_factory=Counter)
    by_rank: Counter[int] = field(default_factory=Counter)
    checkpoints_before: int = 0
    checkpoints_after: int = 0
    lost: list[str] = field(default_factory=list)
    seconds_to_end: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kills": self.kills,
            "restarts": self.restarts,
            "kills_by_stage": dict(self.by_stage),
            "kills_by_moment": dict(self.by_moment),
            "kills_by_rank": {
                str(rank) if rank >= 0 else "launcher": count for rank, count in sorted(self.by_rank.items())
            },
            "checkpoints_before_kills": self.checkpoints_before,
            "checkpoints_after_kills": self.checkpoints_after,
            "lost_checkpoints": len(self.lost),
            "longest_seconds_from_kill_to_end": round(max(self.seconds_to_end, default=0), 1),
        }


class Campaign:
    """One recipe's run, disturbed.

    Args:
        folder: for everything. kills: wanted. processes: of the run. steps: of each stage.
        saving: so many of the kills at least while a checkpoint is saved.
    """

    def __init__(self, folder: Path, kills: int, processes: int, seed: int, steps: int, saving: int = 1):
        self.folder, self.kills, self.processes, self.steps = folder, kills, processes, steps
        self.saving = saving
        self.late = False  # whether all stages were finished when the run was last started
        self.random = random.Random(seed)
        self.tally = Tally()
        self.recipe = self._recipe()
        self.out = folder / "broken"

    def _recipe(self) -> Path:
        path = write_recipe(self.folder)
        recipe = yaml.safe_load(path.read_text())
        for name in STAGES:
            recipe["stages"][name] |= {"max_steps": self.steps, "save_steps": SAVE_STEPS, "logging_steps": 1}
        recipe["evaluate"] = ["toy_city:night", "toy_city:fog", "toy_city:rain"]
        recipe["data"]["toy_city"]["test_images"] = 16
        path.write_text(yaml.safe_dump(recipe))
        return path

    def start(self, out: Path, name: str) -> Launched:
        """Start or continue the run."""
        log = self.folder / f"{name}.log"
        return Launched(
            self.processes if self.processes > 1 else 0, log, "scripts/run_gkd.py", self.recipe, f"output_dir={out}"
        )

    def run(self) -> dict[str, Any]:
        """Disturb until enough kills are done, let it end, compare."""
        whole = self.start(self.folder / "whole", "whole")
        ended = False
        while not ended and (self.tally.kills < self.kills or self._saving_kills_missing() > 0):
            ended = self._one_start()
            if ended and self.tally.kills < self.kills:
                # It was too quick: without its report the same command measures again.
                (self.out / "report.json").unlink()
                ended = False
        if not ended:
            stage, newest = self.stage(), self._newest()
            run = self.start(self.out, "last")
            assert run.wait(600) == 0, run.output()[-4000:]
            self._goes_on_from(run, stage, newest)
            self.tally.restarts += 1
        assert whole.wait(600) == 0, whole.output()[-4000:]
        return self.tally.as_dict() | {"bit_equal": self._is_equal()}

    # -- one kill -----------------------------------------------------------------------------------------------------

    def stage(self) -> str:
        """The stage that is under way; `evaluation` after all."""
        for name in STAGES:
            if not (self.out / "stages" / name / "finished.json").is_file():
                return name
        return "evaluation"

    def _newest(self) -> int:
        """Step of the newest checkpoint that stands in the stage under way, 0 without one."""
        folder = self.out / "stages" / self.stage()
        found = [int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")]
        return max(found, default=0)

    def _one_start(self) -> bool:
        """Start the run and kill a process of it; returns whether it came to its end before that."""
        stage, newest = self.stage(), self._newest()
        self.late = stage == "evaluation"
        run = self.start(self.out, f"start-{self.tally.kills}")
        self.tally.restarts += self.tally.kills > 0
        try:
            self._until_the_moment(run, stage)
            workers = run.workers() or {-1: run.process.pid}
            if run.process.poll() is not None:
                assert run.process.returncode == 0, run.output()[-4000:]
                return True
            rank = self.random.choice(sorted(workers))
            killed = self.stage()
            before = self._newest()
            began = time.monotonic()
            if rank < 0:
                run.kill()  # the launcher, before it has started any process
            else:
                os.kill(workers[rank], signal.SIGKILL)
            code = run.wait(120)
        finally:
            if run.process.poll() is None:
                run.kill()
        if code == 0:
            return True  # the process had done its work
        self._goes_on_from(run, stage, newest)
        self.tally.seconds_to_end.append(time.monotonic() - began)
        self._count(run, killed, before, rank)
        return False

    def _until_the_moment(self, run: Launched, stage: str) -> None:
        pick = self.random
        if stage == "evaluation":
            if pick.random() < 0.3:
                return self._sleep(run, pick.uniform(0, 6))
            self._until(run, lambda: "[task] finished before" in run.output())
            return self._sleep(run, pick.uniform(0, 0.4))
        plan = pick.choices(list(SHARES), list(SHARES.values()))[0]
        if self.kills - self.tally.kills <= self._saving_kills_missing():
            plan = "saving"
        if plan == "start":
            return self._sleep(run, pick.uniform(0, 9))
        self._until(run, lambda: re.search(r"\] step \d+/", run.output()))
        if plan == "training":
            return self._sleep(run, pick.uniform(0, 0.4))
        for _ in range(self._saves_to_wait_for()):
            self._until(run, lambda: not self._saving())
            self._until(run, self._saving)
        return self._sleep(run, pick.uniform(0, 0.02))

    def _saves_to_wait_for(self) -> int:
        """So many that the kills a stage is due are shared out over the saves it has left; then on to the next."""
        index = STAGES.index(self.stage()) if self.stage() in STAGES else len(STAGES)
        due = (index + 1) * (1 - LATE) / len(STAGES) * self.kills - self.tally.kills
        left = (self.steps - self._newest()) // SAVE_STEPS
        return left + 1 if due < 1 else self.random.randint(1, max(1, int(1.5 * left / due)))

    def _saving_kills_missing(self) -> int:
        return self.saving - self.tally.by_moment[SAVING]

    def _saving(self) -> bool:
        stages = self.out / "stages"
        return any((stages / name / ".saving").is_dir() for name in STAGES)

    def _until(self, run: Launched, happened: Any) -> None:
        """Wait for something; no longer than to the run's end, nor to the stages' end where they were under way."""
        while run.process.poll() is None and not happened() and (self.late or self.stage() != "evaluation"):
            time.sleep(0.0005)

    def _sleep(self, run: Launched, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._until(run, lambda: time.monotonic() >= end)

    def _count(self, run: Launched, stage: str, before: int, rank: int) -> None:
        tally = self.tally
        tally.kills += 1
        tally.by_stage[stage] += 1
        tally.by_rank[rank] += 1
        folder = self.out / "stages" / stage
        trained = re.search(rf"\[{stage}\] step \d+/", run.output()) is not None
        if trained and (folder / ".saving").is_dir():
            moment = SAVING
        elif (folder / ".model.new").is_dir():
            moment = "writing a model"
        elif trained:
            moment = "training"
        elif stage == "evaluation" and "[task]" in run.output():
            moment = "evaluation"
        else:
            moment = "start-up"
        tally.by_moment[moment] += 1
        after = 0
        if stage != "evaluation":
            found = standing(folder)
            after = int(found.checkpoint.name.removeprefix("checkpoint-")) if found.checkpoint else 0
            tally.checkpoints_before += before > 0
            tally.checkpoints_after += after > 0
            if after < before or found.passed_over:
                tally.lost.append(f"{stage}: {before} before, {after} after, damaged {dict(found.passed_over)}")
        print(f"kill {tally.kills}: rank {rank}, {stage}, {moment}, step {before} before, {after} after", flush=True)

    def _goes_on_from(self, run: Launched, stage: str, step: int) -> None:
        """Count it as a loss if a start that came to its stage did not go on from the newest checkpoint's step."""
        told = re.search(rf"\[{stage}\] \d+ steps of [^\n]*", run.output())
        if told is None or not step:
            return
        found = re.search(r"going on from step (\d+)", told[0])
        if found is None or int(found[1]) != step:
            self.tally.lost.append(f"'{told[0]}' does not go on from step {step}")

    # -- the end ------------------------------------------------------------------------------------------------------

    def _is_equal(self) -> bool:
        """Whether every model, every file of heads and the report are the undisturbed run's."""
        whole = self.folder / "whole"
        files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
        files = [path for path in files if "checkpoint-" not in str(path)]
        assert len(files) >= 7, files
        different = [str(path) for path in files if (whole / path).read_bytes() != (self.out / path).read_bytes()]
        reports = [(each / "report.json").read_text().replace(str(each), "OUT") for each in (whole, self.out)]
        if reports[0] != reports[1]:
            different.append("report.json")
        for name in different:
            print(f"differs: {name}", flush=True)
        return not different


def main() -> int:
    """Return 0 if nothing was lost and the ends are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of each stage")
    parser.add_argument("--folder", type=Path, help="a new folder to work in (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(folder, options.kills, options.processes, options.seed, options.steps)
        result = campaign.run()
    for loss in campaign.tally.lost:
        print(f"lost: {loss}")
    print(json.dumps(result))
    return 0 if result["bit_equal"] and not campaign.tally.lost and result["kills"] >= options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
