"""Real processes that are ended, stopped and killed: one clear line, nothing lost, the same command goes on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from gkd_hf.training.checkpoints import checkpoint_step, last_complete_checkpoint
from tests.cli.test_kill_and_resume import write_recipe
from tests.distributed.fault_campaign import SAVING, Campaign
from tests.distributed.launched import Launched

FAULTS = "tests/distributed/run_faults.py"
OF_THE_LAUNCHER = re.compile(
    r"torch/distributed/elastic|torch/distributed/(run|launcher)|accelerate/commands|<frozen runpy>"
)


def own_traces(output: str) -> list[str]:
    """Lines of stack traces that are not the launcher's own report."""
    lines = [line for line in output.splitlines() if line.lstrip().startswith("File ")]
    return [line for line in lines if not OF_THE_LAUNCHER.search(line)]


def test_sigterm_and_a_killed_process(tmp_path: Path) -> None:
    """SIGTERM to the launcher, SIGTERM to one process, SIGKILL to one process; each time the same command goes on."""
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    stage = out / "stages" / "task_agnostic"
    saved = f"SIGTERM: saved {stage}/checkpoint-"

    def started(name: str, goes_on_from: int | None) -> Launched:
        long = "stages.task_agnostic.max_steps=1000"
        run = Launched(2, tmp_path / name, "scripts/run_gkd.py", recipe, f"output_dir={out}", long)
        run.until(lambda: "[task_agnostic] step " in run.output(), "training")
        run.until(lambda: last_complete_checkpoint(stage), "checkpoint")
        assert goes_on_from is None or f"going on from step {goes_on_from}\n" in run.output()
        return run

    # The launcher passes it on, and ends with a report of its own.
    run = started("launcher", None)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == 1 and "SignalException" in run.output()
    before = checkpoint_step(last_complete_checkpoint(stage))
    assert run.output().count(f"{saved}{before}; the same command goes on from there") == 1
    assert own_traces(run.output()) == []

    # One process that got it is enough; nobody failed, so the launcher ends well.
    run = started("one process", before)
    os.kill(run.workers()[1], signal.SIGTERM)
    assert run.wait() == 0, run.output()
    assert checkpoint_step(last_complete_checkpoint(stage)) > before
    before = checkpoint_step(last_complete_checkpoint(stage))
    assert run.output().count(f"{saved}{before}; the same command goes on from there") == 1

    run = started("killed", before)
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.wait() == 1
    assert own_traces(run.output()) == [], run.output()
    root_cause = run.output()[run.output().index("Root Cause") :]
    assert re.search(r"rank +: 1 ", root_cause) and "(SIGKILL)" in root_cause
    assert run.output().count("another process of the run ended") == 1
    assert checkpoint_step(last_complete_checkpoint(stage)) >= before
    assert not (stage / "finished.json").exists()


def test_an_error_of_one_process_ends_all_and_is_shown_first(tmp_path: Path) -> None:
    run = Launched(2, tmp_path / "log", FAULTS, "wrong", tmp_path)
    assert run.wait() == 1
    assert run.output().count("error: something is wrong here: mend it\n") == 1
    assert own_traces(run.output()) == [], run.output()
    others = [line for line in run.output().splitlines() if line.startswith(("error", "process 0", "SIGTERM"))]
    assert others[0].startswith("error: something is wrong")
    assert re.search(r"rank +: 1 ", run.output()[run.output().index("Root Cause") :])


def test_a_folder_that_hosts_do_not_share_is_refused_before_training(tmp_path: Path) -> None:
    run = Launched(2, tmp_path / "log", FAULTS, "unshared", tmp_path)
    assert run.wait() == 1
    told = f"error: output_dir '{tmp_path}/host-1' of the main process is not seen by process 1: it must be on a file"
    assert run.output().count(told) == 1, run.output()
    assert own_traces(run.output()) == [] and "'loss'" not in run.output()


def test_a_process_that_hangs_ends_the_others_with_one_line(tmp_path: Path) -> None:
    """Before that one of the two got SIGTERM at the end of a training, which ends it for both."""
    run = Launched(2, tmp_path / "log", FAULTS, "hung", tmp_path / "out")
    run.until(lambda: "error: " in run.output(), "end of the wait")
    preempted = re.findall(r"process \d is preempted", run.output())
    assert sorted(preempted) == ["process 0 is preempted", "process 1 is preempted"], run.output()
    os.kill(run.workers()[1], signal.SIGKILL)  # the launcher would wait half a minute for it
    assert run.wait() == 1
    told = re.findall(
        r"error: no answer from another process for 0.25 min in step 4 of distil: it hangs", run.output()
    )
    assert len(told) == 1, run.output()
    assert own_traces(run.output()) == []
    assert last_complete_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")


def test_killed_at_random_moments_and_bit_equal(tmp_path: Path) -> None:
    """A short form of what `python tests/distributed/fault_campaign.py` does fifty times."""
    campaign = Campaign(tmp_path, kills=3, processes=2, seed=1, steps=16, saving=1)
    found = campaign.run()
    assert campaign.tally.lost == []
    assert found["kills"] >= 3 and found["kills_by_moment"][SAVING] >= 1
    assert found["bit_equal"]
