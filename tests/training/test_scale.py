"""Scale on paper: simulated steps against real ones and against hand-worked counts, and what --plan --gpus prints."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gkd_hf.models.loading import config_from_mapping
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training import scale_table
from gkd_hf.training.live_memory import LiveMemory
from gkd_hf.training.plan import PlannedEncoder
from gkd_hf.training.recipe import Recipe, StageRecipe
from gkd_hf.training.recipe_file import load_recipe
from gkd_hf.training.scale import RESERVED, Layout, StageScale, stage_scale
from gkd_hf.training.scale_question import ScaleQuestion
from gkd_hf.training.scale_table import scale_report
from gkd_hf.training.step_cost import DistillationStep, SegmentationStep, Step, StepCost, as_on_gpu
from tests.tiny import ENCODERS, MASK2FORMER

ROOT = Path(__file__).parents[2]
LAYERS = 2
VIT = ENCODERS["vit"] | {"num_hidden_layers": LAYERS}
STUDENT, TEACHER = (config_from_mapping(each | {"num_hidden_layers": LAYERS}) for each in (VIT, ENCODERS["dinov2"]))
AS_HERE: dict[str, Any] = {"precision": "fp32", "on_gpu": False}
STEPS: dict[str, Step] = {
    "vit": DistillationStep(STUDENT, [TEACHER], 64, **AS_HERE),
    "early": DistillationStep(STUDENT, [TEACHER], 64, early_backward=True, **AS_HERE),
    "resnet": DistillationStep(config_from_mapping(ENCODERS["resnet"]), [TEACHER], 64, **AS_HERE),
    "mask2former": SegmentationStep(
        STUDENT, 32, decode_head=MASK2FORMER | {"decoder_layers": 2}, classes=12, **AS_HERE
    ),
    "end-to-end": SegmentationStep(STUDENT, 64, decode_head="linear", classes=12, frozen=False, **AS_HERE),
}


def real_peak(step: Step, batch: int, checkpointing: bool) -> int:
    """Bytes that torch's allocator has given out at the most in two real steps, by the profiler's own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        model, _, _, teacher = step.build()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for _ in range(2):
            pixels = torch.randn(batch, 3, step.image_size, step.image_size)
            if teacher is None:
                labels = torch.arange(step.image_size)[:, None].expand(batch, -1, step.image_size) * 12
                loss = model(pixel_values=pixels, labels=labels // step.image_size).loss
            else:
                loss = step.loss(model, pixels, step.teach(teacher, pixels))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            del pixels, loss
    events = sorted(
        (event for event in records.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    return int(np.cumsum([event.nbytes() for event in events]).max())


@pytest.mark.parametrize("name", STEPS)
def test_estimate_is_what_a_real_step_takes(name: str) -> None:
    costs = STEPS[name].costs((4,))
    assert (costs[True] is None) == (name == "resnet")
    for checkpointing, cost in costs.items():
        if cost is not None:
            assert cost[0].total() == pytest.approx(real_peak(STEPS[name], 4, checkpointing), rel=0.2)


@cache
def costs(batches: tuple[int, ...], precision: str) -> dict[bool, tuple[StepCost, ...] | None]:
    return DistillationStep(STUDENT, [TEACHER], 64, precision=precision).costs(batches)


@pytest.mark.parametrize(
    ("precision", "teacher_bytes", "batches"), [("bf16", 2, (4, 8, 12)), ("fp32", 4, (4,))], ids=("bf16", "fp32")
)
def test_weights_are_counted_in_their_precision(precision: str, teacher_bytes: int, batches: tuple[int, ...]) -> None:
    cost = costs(batches, precision)[False][0]
    model, student, heads, teacher = STEPS["vit"].build()
    parameters = sum(p.numel() for p in student.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert cost.student.bytes == 4 * parameters
    assert cost.heads.bytes == 4 * sum(p.numel() for p in heads.parameters())
    statistics = 2 * 3 * 4  # image mean and standard deviation stay in fp32
    assert cost.teachers[0].bytes == teacher_bytes * sum(p.numel() for p in teacher.parameters()) + statistics
    assert cost.optimiser == sum(8 * p.numel() + 4 for p in trained)  # two moments, and the step
    gradients = cost.moments["optimiser"][:, 3:].max(0)
    assert gradients.sum() == 4 * sum(p.numel() for p in trained)
    copies = cost.moments["forward"][:, 2].max()
    assert (0 < copies < 2 * parameters + 2 * cost.heads.bytes) if precision == "bf16" else copies == 0


def test_operations_of_a_vit_are_those_worked_out_by_hand() -> None:
    batch, width, hidden, patch, grid = 2, 24, 48, 8, 4
    tokens = grid**2 + 1
    with torch.device("meta"):
        teacher = GKDTeacher(STUDENT)
    # torch has no formula for the CPU's fused attention, only for the GPU's.
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu(), LiveMemory(("activations",)) as memory:
        mean = torch.zeros(1, 3, 1, 1)
        teacher.to_empty(device="cpu")(torch.zeros(batch, 3, 32, 32), (grid, grid), mean, mean + 1)
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    embedding = grid**2 * 3 * patch**2 * width
    assert memory.flops == 2 * batch * (LAYERS * block + embedding)


def test_backward_costs_twice_the_forward_and_is_counted_as_torch_does() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 8))
    with LiveMemory(("activations",)) as memory:
        forward = layers(torch.zeros(5, 16, requires_grad=True))
        assert memory.flops == 2 * 5 * (16 * 32 + 32 * 8)
        forward.sum().backward()
    assert memory.flops == 3 * 2 * 5 * (16 * 32 + 32 * 8)
    step = STEPS["vit"]
    model, _, _, teacher = step.build()
    with FlopCounterMode(display=False) as counter:
        pixels = torch.zeros(4, 3, 64, 64)
        step.loss(model, pixels, step.teach(teacher, pixels)).backward()
    assert step.costs((4,))[False][0].flops == counter.get_total_flops()


def test_live_memory_forgets_what_is_gone() -> None:
    with LiveMemory(("activations", "kept")) as memory, memory.phase("all", "activations"):
        first = torch.zeros(1000)
        second = first + 1
        memory.claim([second], "kept")
        del first
        view = second[:10]
        assert view.sum() == 10
    assert memory.live["activations"] == 0
    assert memory.live["kept"] == 4000
    assert max(map(sum, memory.history["all"])) >= 8000


def test_contiguous_copies_that_a_softmax_makes_are_counted() -> None:
    images = torch.zeros(2, 6, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    size = images.numel() * 4
    for given, copies in ((images, 1), (images.detach().contiguous(), 0)):
        with LiveMemory(("logits",)) as memory, memory.phase("all", "logits"):
            memory.claim([given], "logits")
            result = torch.log_softmax(given, 1)
        assert max(map(sum, memory.history["all"])) == (2 + copies) * size
        assert memory.live["logits"] == result.numel() * 4 + size


def test_every_moment_is_affine_in_the_batch() -> None:
    for each in costs((4, 8, 12), "bf16").values():
        small, middle, large = each
        assert 3 * small.flops == large.flops
        for phase in ("teacher", "forward", "backward", "optimiser"):
            a, b, c = (cost.moments[phase] for cost in (small, middle, large))
            assert a.shape == b.shape == c.shape
            assert np.array_equal(c - b, b - a)


def test_one_view_at_a_time_takes_less_memory_and_as_many_operations() -> None:
    settings = {"precision": "bf16", "mask_probability": 1.0}
    both, early = (
        DistillationStep(STUDENT, [TEACHER], 64, early_backward=each, **settings).costs((8,))[False][0]
        for each in (False, True)
    )
    assert early.flops == both.flops
    activations = [cost.moments["forward"][:, 0].max() for cost in (both, early)]
    gradients = 4 * early.student.trained + 4 * early.heads.trained
    assert activations[1] < 0.65 * activations[0] + gradients


def test_a_gpu_never_holds_an_attention_matrix() -> None:
    width, tokens, heads = 24, 64 * 64 + 1, 2
    config = config_from_mapping(VIT | {"image_size": 512})
    cost = DistillationStep(config, [config], 512).costs((2,))[False][0]
    assert cost.total() < 2 * heads * tokens**2 * 2  # one block's matrices of two images in bf16
    assert cost.total() > 2 * tokens * width * 2


QUICKSTART = ROOT / "scripts/recipes/quickstart.yaml"


@cache
def simulated() -> StageScale:
    recipe = load_recipe(QUICKSTART, ["teacher.sharding=always", "stages.task_agnostic.precision=bf16"])
    encoders = (PlannedEncoder("student", STUDENT, False), PlannedEncoder("teacher", TEACHER, False))
    return stage_scale(recipe, "task_agnostic", recipe.stages.task_agnostic, *encoders)


def scale(*overrides: str, sharding: str = "auto") -> StageScale:
    """Of the same simulated steps, whatever the batch size."""
    recipe = load_recipe(QUICKSTART, list(overrides))
    return StageScale("task_agnostic", recipe.stages.task_agnostic, simulated().costs, sharding)


BATCH = ("stages.task_agnostic.batch_size=64",)


def test_fsdp_divides_weights_gradients_and_optimiser() -> None:
    each = scale(*BATCH, "stages.task_agnostic.ema_decay=0.99", sharding=simulated().teacher_sharding)
    cost = each.costs[False][0]
    for gpus in (2, 8):
        parts = each.footprint(Layout(gpus, fsdp=True)).parts
        assert parts["student's weights"] == cost.student.bytes / gpus
        assert parts["student's gradients"] == 4 * cost.student.trained / gpus
        assert parts["optimiser's states"] == pytest.approx(8 * cost.student.trained / gpus, rel=0.02)
        assert parts["weight average"] == 4 * (cost.student.trained + cost.heads.trained) / gpus
        student = STEPS["vit"].build()[1].encoder
        largest = max(sum(p.numel() for p in layer.parameters()) for layer in (student.embeddings, student.layers[0]))
        assert cost.student.largest_layer == largest
        gathered = cost.student.outside + 2 * largest + cost.heads.parameters
        assert parts["gathered layers"] == 4 * 2 * gathered
        layers = cost.teachers[0].outside + 2 * cost.teachers[0].largest_layer
        assert parts["teacher's weights"] == pytest.approx(cost.teachers[0].bytes / gpus + 2 * layers, rel=0.01)
        assert "gradient buckets" not in parts
    assert scale(*BATCH, sharding="never").footprint(Layout(8)).parts["teacher's weights"] == cost.teachers[0].bytes
    assert scale(*BATCH).shards_teachers(8) == [False]  # small


def test_fsdp_keeps_whole_gradients_between_micro_batches() -> None:
    each = scale(*BATCH)
    cost = each.costs[False][0]
    once, twice = (each.footprint(Layout(8, accumulation, fsdp=True)).parts for accumulation in (1, 2))
    assert once["student's gradients"] == 4 * cost.student.trained / 8
    assert twice["student's gradients"] == 4 * cost.student.trained
    assert twice["heads"] - once["heads"] == pytest.approx(4 * cost.heads.trained * 7 / 8)
    assert twice["optimiser's states"] == once["optimiser's states"]


def test_ddp_keeps_everything_and_adds_buckets() -> None:
    each = scale(*BATCH)
    cost = each.costs[False][0]
    alone, together = each.footprint(Layout(1)), each.footprint(Layout(8))
    assert "gradient buckets" not in alone.parts
    assert together.parts["gradient buckets"] == 4 * (cost.student.trained + cost.heads.trained)
    assert together.parts["student's weights"] == alone.parts["student's weights"]
    assert together.parts["activations"] == pytest.approx(alone.parts["activations"] / 8, rel=0.1)
    accumulated = each.footprint(Layout(1, accumulation=8))
    assert accumulated.parts["student's gradients"] == 4 * cost.student.trained
    assert accumulated.parts["activations"] == pytest.approx(together.parts["activations"], rel=0.01)
    again = each.footprint(Layout(1, checkpointing=True))
    assert again.parts["activations"] < 0.7 * alone.parts["activations"]
    assert each.step_flops(True) > 1.05 * each.step_flops(False)
    question = ScaleQuestion(1, tflops=100, utilisation=0.5)
    assert each.hours(3600, 2, False, question) == pytest.approx(each.step_flops(False) / 1e14)


def test_the_advice_fits() -> None:
    each = scale("stages.task_agnostic.batch_size=4096")
    memory = (RESERVED + 0.7 * (each.footprint(Layout(2)).total - RESERVED)) / 1e9
    ways = each.ways_to_fit(2, memory)
    assert any(layout.accumulation > 1 and not layout.checkpointing for layout, _ in ways)
    assert any(layout.checkpointing and layout.accumulation == 1 for layout, _ in ways)
    for layout, footprint in ways:
        assert footprint.fits(memory)
        assert footprint.total == each.footprint(layout).total
    smallest = each.smallest(memory)
    assert each.footprint(smallest).fits(memory)
    assert not each.footprint(Layout(1)).fits(memory)
    assert each.smallest(0.001) is None


def test_what_masks_nothing_is_marked_and_never_advised() -> None:
    each = scale(*BATCH)  # 64 images, of which half are masked
    assert [gpus for gpus in (1, 2, 4, 8, 16, 32, 64) if each.masks_nothing(gpus)] == [64]
    assert not scale(*BATCH, "stages.task_agnostic.mask_probability=1").masks_nothing(64)
    assert not scale(*BATCH, "stages.task_agnostic.mask_probability=0").masks_nothing(64)
    two, one = (each.footprint(Layout(32, accumulation)).total for accumulation in (1, 2))
    assert one < two
    between = (one + two) / 2e9
    ways = each.ways_to_fit(32, between)
    assert ways
    assert all(layout.accumulation == 1 for layout, _ in ways)
    least = each.footprint(Layout(64, fsdp=True, checkpointing=True))
    assert each.smallest(least.total / 1e9) is None
    assert each.ways_to_fit(64, 80) == []


KNOWN: dict[tuple[str, bool], StageScale] = {}


def simulated_once(recipe: Recipe, name: str, stage: StageRecipe, *encoders: PlannedEncoder) -> StageScale:
    """`stage_scale`, which does not depend on the batch size, on which tests differ."""
    key = (name, bool(recipe.baselines))
    if key not in KNOWN:
        KNOWN[key] = stage_scale(recipe, name, stage, *encoders)
    return StageScale(name, stage, KNOWN[key].costs, KNOWN[key].teacher_sharding)


@pytest.fixture(autouse=True)
def _simulate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_table, "stage_scale", simulated_once)


def report(question: ScaleQuestion, *overrides: str) -> str:
    settings = [f"student.encoder={json.dumps(VIT)}", "stages.domain_agnostic=null", *overrides]
    return scale_report(load_recipe(QUICKSTART, settings), question)


def test_report_tells_of_baselines_and_of_what_masks_nothing() -> None:
    text = report(
        ScaleQuestion(16),
        "stages.task_agnostic.batch_size=16",
        "stages.task.activation_checkpointing=true",
        "stages.task.batch_size=16",
        "baselines=[none]",
    )
    first, task, baseline = text.split("\nscale of ")[1:]
    assert max(map(len, text.splitlines())) <= 100
    rows = {line.split()[0]: line.split()[1] for line in first.splitlines() if line[:7].strip().isdigit()}
    assert rows == {"1": "16", "2": "8", "4": "4", "8": "2", "16": "!1"}
    assert "  ! no image would be masked" in first
    assert "NO IMAGE IS MASKED there" in first
    assert "!" not in task + baseline
    assert task.startswith("stage task: ")
    assert "ddp+ac" not in task
    assert "activation_checkpointing is for them alone" in task
    assert "16 GPUs of 80 GB, ddp: fits" in task
    assert baseline.startswith("baseline none: ")
    assert "16 GPUs of 80 GB, ddp+ac: fits" in baseline


def test_a_baseline_is_estimated_with_its_encoder() -> None:
    recipe = load_recipe(QUICKSTART, ["baselines=[none]"])
    encoders = (PlannedEncoder("student", STUDENT, False), PlannedEncoder("teacher", TEACHER, False))
    task, baseline = (simulated_once(recipe, name, recipe.stages.task, *encoders) for name in ("task", "none"))
    segmenter = STEPS["end-to-end"].build()[0]
    trained = sum(p.numel() for p in segmenter.student.parameters() if p.requires_grad)
    assert trained > 0
    assert (task.costs[False][0].student.trained, baseline.costs[False][0].student.trained) == (0, trained)
    assert baseline.costs[False][1].moments["optimiser"][:, 3].max() == 4 * trained
    frozen, learning = (each.footprint(Layout(1)).parts for each in (task, baseline))
    states = 32 * (8 * 8 + 1) * 24 * 4  # of one layer, between its blocks
    assert learning["activations"] > frozen["activations"] + 5 * LAYERS * states
    assert frozen["optimiser's states"] == 0
    assert learning["optimiser's states"] == pytest.approx(8 * trained, rel=0.02)
    assert task.costs[True] is None
    assert baseline.costs[True] is not None


def test_a_setting_that_does_nothing_for_the_stage_is_left_out() -> None:
    recipe = load_recipe(QUICKSTART, ["stages.task.activation_checkpointing=true"])
    each = stage_scale(recipe, "task", recipe.stages.task, PlannedEncoder("student", STUDENT, False), None)
    own = each.footprint(Layout(1)).total
    assert all(not layout.checkpointing for layout, _ in each.ways_to_fit(1, 0.999 * own / 1e9))


def test_report_tells_what_fits_and_what_to_do() -> None:
    changes = ("stages.task_agnostic.batch_size=4096", "stages.task.batch_size=6", "baselines=[]")
    text = report(ScaleQuestion(4, memory=1.6), *changes)
    first, task = text.split("scale of stage ")[1:]
    assert max(map(len, text.splitlines())) <= 100
    assert "4 GPUs of 1.6 GB, ddp: DOES NOT FIT" in first
    assert "fits with stages.task_agnostic.gradient_accumulation_steps=" in first
    assert [line.split()[0] for line in first.splitlines() if line[:7].strip().isdigit()] == [
        str(2**power) for power in range(10)
    ]
    assert "no row for 4 … 512: so many GPUs cannot share 6 images evenly" in task
    assert "4 GPUs cannot share the 6 images of a step of stage task evenly: at most 3 can" in task
    roomy = report(ScaleQuestion(2), *changes)
    assert roomy.count(": fits, ") == 2
    assert "*" not in roomy.split("scale of stage ", 1)[1]


def run_gkd(*words: str) -> int:
    spec = importlib.util.spec_from_file_location("run_gkd", ROOT / "scripts" / "run_gkd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(words))


def test_unknown_encoders_are_said_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "scripts/recipes/gtav_dinov2b_deits.yaml")
    assert run_gkd(path, "student.encoder=org/other", "--plan", "--gpus", "8", "--memory", "40") == 0
    text = capsys.readouterr().out
    assert "40 GB" in text
    for name in ("task_agnostic", "domain_agnostic", "task"):
        assert f"scale of stage {name}: memory is unknown without the Hub, which knows org/other" in text


@pytest.mark.parametrize(
    "words",
    [
        ("--plan", "--gpus", "x"),
        ("--plan", "--gpus", "0"),
        ("--plan", "--gpus", "1.5"),
        ("--plan", "--gpus", "8", "--memory", "-1"),
        ("--plan", "--gpus", "8", "--memory", "80GB"),
        ("--plan", "--gpus", "8", "--gpu-tflops", "nan"),
        ("--plan", "--gpus", "8", "--utilisation", "35"),
        ("--plan", "--memory", "80"),
        ("--gpus", "8"),
    ],
    ids=" ".join,
)
def test_nonsense_is_refused_in_one_line(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_gkd(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words[-2]} ")
    assert len(error.splitlines()) == 1
