"""The arms of the step's benchmark compute the same loss and gradients, and its script prints what it measured."""

from __future__ import annotations

import importlib.util
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from gkd_hf.benchmarks import step, step_report
from gkd_hf.benchmarks.step import StepSettings, arms_of, compare, kept_for_backward, parts_seconds
from gkd_hf.benchmarks.step_arms import frozen_batch_norms
from tests.tiny import ENCODERS


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vit", "dinov2", "resnet"):
        monkeypatch.setitem(step.PRESETS, name, ENCODERS[name])


def settings(student: str = "vit", **changes: object) -> StepSettings:
    return StepSettings(**({"student": student, "teacher": "dinov2", "batch_size": 4, "image_size": 32} | changes))


@pytest.mark.parametrize("student", ["vit", "dinov2", "resnet"])
def test_ours_and_the_method_as_written_agree(student: str) -> None:
    with arms_of(settings(student)) as arms:
        reference, ours = arms["reference"], arms["ours"]
        with frozen_batch_norms(reference.model.student), frozen_batch_norms(ours.model.student):
            expected, loss = reference.learn(), ours.learn()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        others = dict(reference.model.named_parameters())
        whole = torch.stack([each.grad.norm() for each in others.values()]).norm()
        compared = 0
        for name, own in ours.model.named_parameters():
            wanted = others[name].grad
            if own.grad is None:
                assert name.startswith("objective.token.query") and wanted.abs().max() < 1e-6 * whole, name
                continue
            compared += 1
            # Key biases have no gradient but rounding: attention does not change with them.
            assert (own.grad - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6 * whole, name
        assert compared > 20


def test_the_reference_does_more_and_keeps_more() -> None:
    with arms_of(settings()) as arms:
        seen: dict[str, list[int]] = {}
        for name, arm in arms.items():
            student = arm.model if name == "floor" else arm.model.student
            counts = seen.setdefault(name, [])
            student.register_forward_pre_hook(lambda module, args, counts=counts: counts.append(len(args[0])))
        equality, kept = compare(arms["reference"], arms["ours"])
        kept["floor"] = kept_for_backward(arms["floor"])
        assert seen == {"reference": [4, 4], "ours": [4, 2], "floor": [4, 2]}
        assert kept["floor"] < kept["ours"] < kept["reference"]
        assert 0 <= equality["loss_difference"] < 1e-5 and 0 < equality["gradient_difference"] < 1e-5


def test_a_step_in_parts_is_a_step() -> None:
    """Cut apart at the student's tokens, the same weights come out."""
    with arms_of(settings()) as arms, arms_of(settings()) as others:
        seconds = parts_seconds(arms, torch.device("cpu"), rounds=1)
        for name, arm in arms.items():
            assert set(seconds[name]) == set(step.PARTS) and min(seconds[name].values()) >= 0
            others[name].step()
            for own, wanted in zip(arm.model.parameters(), others[name].model.parameters(), strict=True):
                torch.testing.assert_close(own, wanted, rtol=0, atol=2e-7)


def test_an_arm_that_is_taken_away_frees_its_weights() -> None:
    with arms_of(settings()) as arms:
        weights = {name: weakref.ref(arm.model) for name, arm in arms.items() if name != "ours"}
        assert set(weights) == {"reference", "floor"}
        del arms["reference"], arms["floor"]
        assert [each() for each in weights.values()] == [None, None]
        assert arms["ours"].learn().isfinite()


@pytest.mark.parametrize(
    "device, peak",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", None),
        ("NVIDIA H20", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_peak_is_that_of_the_whole_name(device: str, peak: int | None) -> None:
    assert step.known_peak(device) == peak


def test_the_profilers_own_wait_is_not_the_steps() -> None:
    def event(name: str, start: int, end: int, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)

    events = [
        event(step_report.STEP, 0, 10),
        event(step_report.STEP, 10, 20),
        event(step_report.STEP, 5, 40, DeviceType.CUDA),  # as the device sees it, later
        event("cudaStreamSynchronize", 12, 13),
        event("Memcpy DtoH (Device -> Pageable)", 30, 31, DeviceType.CUDA),
        event("cudaDeviceSynchronize", 21, 40),
    ]
    assert step_report.calls_a_step(events) == {"cudaStreamSynchronize": 0.5, "Memcpy DtoH": 0.5}


def script(*arguments: str) -> int:
    path = Path(__file__).parents[2] / "scripts" / "benchmark_step.py"
    spec = importlib.util.spec_from_file_location("benchmark_step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    try:
        return module.main(list(arguments))
    finally:
        torch.set_num_threads(threads)


def test_the_script_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_report, "STEPS", 2)
    tiny_case = ("--student", "vit", "--teacher", "dinov2", "--batch-size", "4", "--image-size", "32")
    assert script(*tiny_case, "--rounds", "1", "--threads", "1", "--profile") == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert {"speedup", "over_floor", "images_per_s", "peak_mb", "loss_difference"} <= result.keys()
    for name in ("speedup", "over_floor"):
        least, most = result[f"{name}_range"]
        assert least <= result[name] <= most
    assert result["peak_mb"] == result["peak_mb_by_arm"]["ours"] > result["activation_mb"]["ours"] > 0
    assert result["mfu"] is None and result["profile"]["aten::copy_"] > 0
    assert "aten::addmm" in out and "heads, ms" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--student", "no/such/folder/here"), "no/such/folder/here"),
        (("--student", "vit-x"), "unknown model 'vit-x', did you mean 'vit-"),
        (("--batch-size", "1"), "batch_size is 1"),
        (("--precision", "fp16"), "precision is 'fp16'"),
        (("--threads", "0"), "threads is 0"),
        (("--image-size", "30"), "30"),
        (("--patch-size", "0"), "patch_size is 0"),
        (("--patch-size", "-2"), "patch_size is -2"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("--student", "vit", "--teacher", "dinov2", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]
