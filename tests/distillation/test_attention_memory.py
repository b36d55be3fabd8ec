"""QSD's attention never holds the N×N matrix, forward or backward, whatever the width and the precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gkd_hf.benchmarks.step_arms import written_attention
from gkd_hf.distillation import query_based
from gkd_hf.distillation.query_based import QuerySoftDistillation, fused_attention

BATCH, STUDENT_DIM = 2, 8


def allocations(
    folder: Path, head: QuerySoftDistillation, tokens: int, bf16: bool, written: bool = False
) -> tuple[int, int]:
    """Most bytes at once, and largest allocation, of a forward and backward pass; inside kernels, too."""
    torch.manual_seed(0)
    width = head.value.proj.out_features
    student = torch.randn(BATCH, tokens, STUDENT_DIM, requires_grad=True)
    teacher = torch.randn(BATCH, tokens, width)
    head.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            mixed = written_attention(head, student, teacher) if written else head(student, teacher)
        mixed.float().square().mean().backward()
    assert student.grad.abs().sum() > 0 and head.query.proj.weight.grad.abs().sum() > 0
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    sizes = torch.tensor([event["args"]["Bytes"] for event in events])  # < 0 where something is freed
    return sizes.cumsum(0).max().item(), sizes.max().item()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [16, 20])
def test_memory_grows_linearly(width: int, bf16: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = QuerySoftDistillation(STUDENT_DIM, width)
    few, _ = allocations(tmp_path, head, 1024, bf16)
    many, largest = allocations(tmp_path, head, 4096, bf16)
    assert largest < 4096 * 4096 * 2 / 8  # far from one sample's matrix, be it in bf16
    assert 1 < many / few < 4.4


def test_the_method_as_written_does_not(tmp_path: Path) -> None:
    head = QuerySoftDistillation(STUDENT_DIM, 16)
    few, _ = allocations(tmp_path, head, 256, False, written=True)
    many, largest = allocations(tmp_path, head, 1024, False, written=True)
    assert largest == BATCH * 1024 * 1024 * 4
    assert many / few > 10


@pytest.mark.parametrize("width", [16, 20])
def test_filling_up_changes_nothing(width: int) -> None:
    torch.manual_seed(0)
    query, value = (torch.randn(2, 9, width, dtype=torch.double, requires_grad=True) for _ in range(2))
    key = torch.randn(2, 9, width, dtype=torch.double)
    mixed = fused_attention(query, key, value, 0.3)
    expected = (query @ key.transpose(1, 2) * 0.3).softmax(-1) @ value
    torch.testing.assert_close(mixed, expected)
    cotangent = torch.randn_like(mixed)
    ours = torch.autograd.grad(mixed, (query, value), cotangent)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (query, value), cotangent))


@pytest.mark.parametrize("width, enabled", [(768, False), (1024, True)])
def test_the_fused_kernel_is_the_one_that_runs(width: int, enabled: bool) -> None:
    head = QuerySoftDistillation(STUDENT_DIM, width)
    student, teacher = torch.randn(1, 4, STUDENT_DIM, requires_grad=True), torch.randn(1, 4, width)
    with (
        profile(activities=[ProfilerActivity.CPU]) as profiler,
        torch.autocast("cpu", torch.bfloat16, enabled=enabled),
    ):
        head(student, teacher).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


def test_a_missing_kernel_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_based, "_looked_at", set())
    tokens = torch.zeros(1, 1, 4, 24)
    for _ in range(2):
        query_based._warn_unless_fused(tokens, tokens, tokens)  # CUDA's kernels take no tensor of the CPU
    (said,) = caplog.messages
    assert "no fused attention of 24 channels in torch.float32" in said and "B×4×4" in said
