"""What is not imported before it is needed: one process that imports the library, uses Auto classes and plans."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gkd_hf.benchmarks.startup import measure
from gkd_hf.errors import InputError

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, runpy, sys

def there(*names):
    return [name for name in names if name in sys.modules]

told = {}
import gkd_hf
told["import"] = there("datasets", "accelerate", "evaluate", "pandas", "pyarrow", "scipy", "matplotlib",
    "transformers.models", "transformers.modeling_utils", "transformers.trainer", "gkd_hf.models.configuration_gkd")
sys.argv = ["run_gkd.py", "--plan"]
try:
    runpy.run_path("scripts/run_gkd.py", run_name="__main__")
except SystemExit as end:
    told["exit"] = end.code
told["plan"] = there("datasets", "evaluate", "matplotlib", "transformers.trainer")
told["needed"] = there("gkd_hf.models.modeling_gkd")
from transformers import AutoModelForSemanticSegmentation
config = gkd_hf.GKDStudentConfig(
    encoder_config={"model_type": "resnet", "embedding_size": 8, "depths": [1] * 4, "hidden_sizes": [8] * 4},
    decode_head={"type": "linear"}, num_labels=3,
)
model = AutoModelForSemanticSegmentation.from_config(config)
told["auto"] = type(model) is gkd_hf.GKDStudentForSemanticSegmentation
told["registered"] = AutoModelForSemanticSegmentation._model_mapping[type(config)] is type(model)
print(json.dumps(told))
"""


def test_a_python_without_the_requirements_is_told_in_one_line() -> None:
    """Without site-packages there is no torch."""
    command = [sys.executable, "-I", "-S", "scripts/run_gkd.py", "--plan"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: gkd_hf needs torch, transformers, which ")
    assert "./scripts/quickstart" in done.stderr and done.stderr.count("\n") == 1


def test_importing_and_planning_leave_out_what_they_do_not_need():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told == {
        "import": [],
        "exit": 0,
        "plan": [],
        "needed": ["gkd_hf.models.modeling_gkd"],
        "auto": True,
        "registered": True,
    }
    assert "Plan of" in ended.stdout


# Who is imported first, and what asks for the configuration or the Auto classes.
ORDERS = [
    "import gkd_hf; from transformers import AutoConfig, AutoModel",
    "from gkd_hf import GKDStudentConfig; import gkd_hf; from transformers import AutoConfig, AutoModel",
    "from transformers import AutoConfig; import gkd_hf; from transformers import AutoModel",
    "from transformers import AutoConfig, AutoModel; import gkd_hf",
]
ASK = """
config = AutoConfig.for_model("gkd_student")
print(type(config) is gkd_hf.GKDStudentConfig, AutoModel._model_mapping[gkd_hf.GKDStudentConfig].__name__)
import importlib, pickle
import transformers.models.auto.configuration_auto as auto
pickle.dumps(auto.__spec__)
importlib.reload(gkd_hf)
print(type(importlib.reload(auto).AutoConfig.for_model("gkd_student")).__name__)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_the_student_whichever_is_imported_first(order):
    program = f"{order}\n{ASK}"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout.split() == ["True", "GKDStudentModel", "GKDStudentConfig"], ended.stderr


MISSPELT = """
import runpy, sys
sys.argv = ["run_gkd.py", "--plan", "stages.task.learning_rat=1"]
try:
    runpy.run_path("scripts/run_gkd.py", run_name="__main__")
except SystemExit as end:
    print(end.code, [name for name in ("torch", "transformers", "datasets", "accelerate") if name in sys.modules])
"""


def test_a_misspelt_key_is_refused_without_torch_and_transformers():
    ended = subprocess.run([sys.executable, "-c", MISSPELT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "unknown key 'stages.task.learning_rat', did you mean 'learning_rate'?" in ended.stderr
    assert ended.stdout.splitlines() == ["2 []"]


def test_a_process_that_fails_is_told(monkeypatch):
    monkeypatch.setattr("gkd_hf.benchmarks.startup.IMPORTS", {"gkd_hf": "raise SystemExit('no such module')"})
    with pytest.raises(InputError, match="ended with exit code 1: no such module"):
        measure(ROOT, [])
    with pytest.raises(InputError, match="recipe 'nothing.yaml' does not exist"):
        measure(ROOT, [Path("nothing.yaml")])
