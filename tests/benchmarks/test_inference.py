"""The inference benchmark: every arm segments alike, memory is counted, and what is not possible is skipped."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from gkd_hf.benchmarks import inference_arms
from gkd_hf.benchmarks.inference import InferenceSettings, measure, peak_bytes, table, tiles_against_plain
from gkd_hf.benchmarks.inference_arms import Scores, build, forwards, onnx_session
from gkd_hf.errors import InputError
from gkd_hf.evaluation import sliding_window
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel
from tests.tiny import ENCODERS

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_inference.py"
TINY = {"window": 32, "stride": 20, "image_size": (32, 48), "label_size": (50, 70), "memory_size": (40, 64)}
SIZES = [
    *("--window", "32", "--stride", "20", "--image-size", "32x48", "--label-size", "50x70", "--memory-size", "40x64"),
    *("--images", "2", "--rounds", "1", "--threads", "1"),
]


@pytest.fixture
def main():
    """The script's entry point, with the threads as they were before afterwards."""
    threads = torch.get_num_threads()
    yield runpy.run_path(str(SCRIPT))["main"]
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=5, decode_head="linear")
    path = tmp_path_factory.mktemp("segmenter")
    model.save_pretrained(path)
    return path


@pytest.fixture
def no_compiler(monkeypatch):
    """As where torch.compile finds no compiler: compiling would take longer than all other tests together."""

    def fail(function, **settings):
        def call(*args):
            raise RuntimeError("no working C++ compiler\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", fail)


def missing_onnx(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))


def test_the_script_measures_a_segmenter_and_skips_what_is_not_possible(
    monkeypatch, capsys, no_compiler, main, folder
):
    missing_onnx(monkeypatch)
    assert main(["--model", str(folder), *SIZES]) == 0
    *shown, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    assert set(result["latency_ms_by_arm"]) == {"eager", "one by one"}
    assert result["batched_over_one_by_one"] > 0 and result["latency_ms"] > 0 and result["images_per_s"] > 0
    assert result["compiled_over_eager"] is None and result["onnx_over_eager"] is None
    assert result["skipped"]["compiled"] == "torch.compile failed: RuntimeError: no working C++ compiler"
    assert re.fullmatch(r"onnx, onnxruntime, onnxscript missing: pip install .*", result["skipped"]["onnx"])
    assert sum("skipped" in line for line in shown) == 2
    assert result["labels_equal"] and result["labels_like_eager_by_arm"]["one by one"] > 0.99
    assert result["scores_mb"] * 2**20 == 5 * 40 * 64 * 4
    assert result["bound_mb"] == result["scores_mb"] + result["window_batch_mb"]
    assert 0 < result["peak_mb"] <= result["bound_mb"]
    assert result["peak_resized_mb"] > 0 and result["bound_resized_mb"] < result["bound_mb"]


def test_a_compiled_arm_is_compared(monkeypatch, folder):
    monkeypatch.setattr(torch, "compile", lambda module, **settings: module)
    monkeypatch.setattr(inference_arms, "onnx_session", lambda model, *rest: Scores(model, "fp32"))
    result = measure(InferenceSettings(model=str(folder), images=1, rounds=1, **TINY))
    assert not result["skipped"] and result["compiled_over_eager"] > 0 and result["onnx_over_eager"] > 0
    assert set(result["labels_like_eager_by_arm"].values()) == {1.0}
    assert "compiled" in table(result) and "onnx" in table(result)


def test_a_graph_is_run_on_batches_of_windows(monkeypatch, folder, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def doubling(segmenter, file, metadata, size):
        """In place of the exporter, which has tests of its own and takes seconds."""
        kind = onnx.TensorProto.FLOAT
        pixels, logits = (
            onnx.helper.make_tensor_value_info(name, kind, ["batch", 3, *size]) for name in ("pixel_values", "logits")
        )
        node = onnx.helper.make_node("Add", ["pixel_values", "pixel_values"], ["logits"])
        graph = onnx.helper.make_graph([node], "double", [pixels], [logits])
        opset = [onnx.helper.make_opsetid("", 18)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), file)

    monkeypatch.setattr(inference_arms, "write_graph", doubling)
    forward = onnx_session(build(str(folder), None, 5, 32), tmp_path, 32, torch.device("cpu"))
    pixels = torch.randn(3, 3, 32, 32)
    assert torch.equal(forward(pixels), 2 * pixels) and torch.equal(forward(pixels[:1]), 2 * pixels[:1])


def test_both_arms_that_cannot_be_made_are_named(monkeypatch, no_compiler, folder, tmp_path):
    missing_onnx(monkeypatch)
    ways, skipped = forwards(build(str(folder), None, 5, 32), "bf16", 32, torch.zeros(1, 3, 32, 32), tmp_path)
    assert list(ways) == ["eager"] and list(skipped) == ["compiled", "onnx"]


def test_memory_counts_what_is_made_and_not_what_is_given():
    given = torch.zeros(1000)

    def run():
        twice = given * 2
        assert given[:10].sum() == 0
        return twice + 1

    assert peak_bytes(run, torch.device("cpu"), [given]) == 8000


def test_tiles_take_less_memory_than_all_scores(monkeypatch):
    monkeypatch.setattr(sliding_window, "TILE", 40 * 256 * 8)  # eight rows
    result = tiles_against_plain(
        InferenceSettings(image_size=(64, 64), label_size=(256, 256), rounds=1), 40, torch.device("cpu")
    )
    labels, scores = 8 * 256 * 256, 4 * 40 * 256 * 256
    assert result["labels_equal"]
    assert result["best_class_mb"]["plain"] * 2**20 > scores
    assert result["best_class_mb"]["tiles"] * 2**20 <= labels + scores / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "rounds is 0"),
        (["--images", "0"], "images is 0"),
        (["--stride", "600"], "stride is 600"),
        (["--precision", "fp16"], "precision is 'fp16'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--threads", "0"], "threads is 0"),
        (["--model", "/nowhere"], "no segmenter at '/nowhere'"),
        (["--model", "/nowhere", "--head", "linear"], "decode head of its own"),
    ],
)
def test_wrong_input_is_one_line(capsys, main, arguments, message):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_a_size_has_two_numbers(capsys, main):
    with pytest.raises(SystemExit, match="2"):
        main(["--image-size", "512"])
    assert "HEIGHTxWIDTH" in capsys.readouterr().err


def test_the_presets_can_be_built(monkeypatch):
    monkeypatch.setitem(inference_arms.PRESETS, "vit-s", ENCODERS["vit"])
    model = build("vit-s", "linear", 7, 64)
    assert model(pixel_values=torch.zeros(1, 3, 64, 64)).logits.shape == (1, 7, 8, 8)
    with pytest.raises(InputError, match="unknown decode_head"):
        build("vit-s", "none", 7, 64)
