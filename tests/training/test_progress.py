"""What a person sees of a run: lines in a log, no second run in the same folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from gkd_hf.errors import InputError
from gkd_hf.training import checks
from gkd_hf.training.checks import lock_output_dir
from gkd_hf.training.progress import StageLines, StageProgress, duration, stage_progress


def test_a_log_gets_lines_and_a_terminal_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(stage_progress("task"), StageLines)
    lines = stage_progress("task")
    state, arguments = TrainerState(global_step=0, max_steps=40), SimpleNamespace()
    lines.on_train_begin(arguments, state, TrainerControl())
    state.global_step = 10
    lines.on_log(arguments, state, TrainerControl(), {"loss": 0.5, "learning_rate": 1e-3, "epoch": 0.1})
    lines.on_log(arguments, state, TrainerControl(), {"train_runtime": 3.0})
    said = capsys.readouterr().err
    assert said.startswith("[task] step 10/40, loss=0.5, lr=0.001; ") and said.count("\n") == 1
    assert "steps/s" in said and said.endswith(" left\n") and "\r" not in said
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert isinstance(stage_progress("task"), StageProgress)


@pytest.mark.parametrize(("seconds", "words"), [(12.4, "12 s"), (425, "7 min 5 s"), (12_000, "3 h 20 min")])
def test_durations_are_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LOCK_PATIENCE", 0.05)
    folder = tmp_path / "run"
    holder = "; ".join(
        [
            "import sys, pathlib, time",
            "from gkd_hf.training.checks import lock_output_dir",
            "lock = lock_output_dir(pathlib.Path(sys.argv[1]))",
            "lock.__enter__()",
            "print('held', flush=True)",
            "time.sleep(60)",
        ]
    )
    root = Path(__file__).parents[2]
    other = subprocess.Popen([sys.executable, "-c", holder, folder], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is going on in output_dir"):
            lock_output_dir(folder).__enter__()
    finally:
        other.kill()
        other.wait()
    with lock_output_dir(folder):
        pass
    with lock_output_dir(folder):
        pass
