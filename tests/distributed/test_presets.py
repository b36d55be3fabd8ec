"""The Accelerate presets: what they say, what Accelerate makes of them, and that their commands run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from gkd_hf import GKDDistillationArguments, InputError
from tests.cli.test_kill_and_resume import write_recipe
from tests.distributed.launched import LAUNCH, PRESETS, ROOT, own_environment

ENGINES = {
    "single": "NO",
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed_zero2": "DEEPSPEED",
    "multinode": "MULTI_GPU",
}


def environment(name: str, *options: str) -> dict[str, str]:
    """What Accelerate tells the processes of a preset."""
    command = ["--config_file", str(PRESETS / f"{name}.yaml"), "--main_process_port", "0", *options, "script.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


def launch(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [*LAUNCH, "--config_file", str(PRESETS / f"{name}.yaml"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=own_environment(), timeout=240)


def test_every_preset_is_known() -> None:
    assert {path.stem for path in PRESETS.iterdir()} == set(ENGINES)


@pytest.mark.parametrize("name", ENGINES)
def test_a_preset_says_when_and_how_and_leaves_the_recipe_its_choices(name: str) -> None:
    text = (PRESETS / f"{name}.yaml").read_text()
    assert "# When:" in text and "# Change:" in text
    assert f"accelerate launch --config_file scripts/accelerate/{name}.yaml" in text
    assert "scripts/run_gkd.py RECIPE" in text
    preset = load_config_from_file(str(PRESETS / f"{name}.yaml"))
    assert preset.distributed_type == ENGINES[name]
    assert preset.mixed_precision == "no" and not preset.dynamo_config and not preset.use_cpu
    told = environment(name)
    assert (told["ACCELERATE_MIXED_PRECISION"], told.get("ACCELERATE_DYNAMO_BACKEND", "NO")) == ("no", "NO")
    assert told.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto") == "auto"
    assert told.get("ACCELERATE_USE_CPU", "False") == "False"


def test_fsdp2_shards_by_the_models_own_layers() -> None:
    told = environment("fsdp2", "--num_processes", "3")
    assert (told["FSDP_VERSION"], told["FSDP_RESHARD_AFTER_FORWARD"]) == ("2", "true")
    assert told["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP" and "FSDP_TRANSFORMER_CLS_TO_WRAP" not in told
    assert (told["FSDP_STATE_DICT_TYPE"], told["FSDP_CPU_RAM_EFFICIENT_LOADING"]) == ("SHARDED_STATE_DICT", "false")


def test_deepspeed_takes_its_numbers_from_the_arguments() -> None:
    told = environment("deepspeed_zero2")
    assert (told["ACCELERATE_USE_DEEPSPEED"], told["ACCELERATE_DEEPSPEED_ZERO_STAGE"]) == ("true", "2")


@pytest.mark.skipif(is_deepspeed_available(), reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_named() -> None:
    run = launch("deepspeed_zero2", "scripts/run_gkd.py", "--plan")
    assert run.returncode == 1
    assert "DeepSpeed is not installed => run `pip3 install deepspeed`" in run.stderr.splitlines()[-1]


def test_a_single_process_runs_a_recipe(tmp_path: Path) -> None:
    changes = ["stages.task_agnostic=null", "stages.domain_agnostic=null", "stages.task.max_steps=2", "evaluate=[]"]
    recipe = write_recipe(tmp_path)
    run = launch("single", ROOT / "scripts/run_gkd.py", recipe, *changes, f"output_dir={tmp_path / 'out'}")
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "out" / "segmenter" / "model.safetensors").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_only_the_launcher_knows_is_refused(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(InputError, match=f"launched for bf16|{precision} overflows"):
        GKDDistillationArguments(str(tmp_path), use_cpu=True)
