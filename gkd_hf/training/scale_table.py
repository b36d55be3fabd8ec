"""What `--plan --gpus N` prints: memory per GPU and hours of each stage, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable

from gkd_hf.methods import ONE_STAGE_METHODS
from gkd_hf.training.plan import PlannedEncoder, planned_encoder, planned_teachers
from gkd_hf.training.recipe import DistillationRecipe, Recipe, StageRecipe
from gkd_hf.training.recipe_data import train_images
from gkd_hf.training.scale import (
    GIGABYTE,
    LARGEST_RUN,
    RESERVED,
    Footprint,
    Layout,
    StageScale,
    rows,
    stage_scale,
)
from gkd_hf.training.scale_question import ScaleQuestion
from gkd_hf.training.stage_arguments import method_of

_WIDTH = 11  # of a column of GB
_PART = 22  # of the names of the parts


def scale_report(recipe: Recipe, question: ScaleQuestion, tell: Callable[[str], object] = lambda line: None) -> str:
    """Return memory per GPU, operations and hours of every stage as text, without network, data or training.

    Args:
        tell: called with a line before each stage, of which one can take half a minute.

    Raises:
        InputError: what the plan itself finds wrong, for example an image size that does not suit the student.
    """
    student = planned_encoder(recipe.student.encoder, recipe.student.pretrained)
    teachers = planned_teachers(recipe)
    reserved = RESERVED / GIGABYTE
    lines = [
        f"scale on GPUs of {question.memory:g} GB, {question.tflops:g} TFLOP/s, {question.utilisation:.0%} utilised",
        "  ddp, fsdp2: GB (10⁹ bytes) on each GPU with scripts/accelerate/{ddp,fsdp2}.yaml; * does not fit",
        "  +ac: with activation_checkpointing, which computes the student's forward twice",
        f"  {reserved:g} GB for CUDA and NCCL are in it; kernels' workspaces and fragmentation are not",
    ]
    for name, stage in recipe.stages:
        for each in (name, *(recipe.baselines if name == "task" else ())):
            tell(f"working out a step of {each} on paper")
            lines += ["", *_stage_lines(recipe, each, stage, student, teachers, question)]
    return "\n".join(lines)


def _stage_lines(
    recipe: Recipe,
    name: str,
    stage: StageRecipe,
    student: PlannedEncoder,
    teachers: list[PlannedEncoder],
    question: ScaleQuestion,
) -> list[str]:
    teaches = isinstance(stage, DistillationRecipe) or method_of(recipe, name) in ONE_STAGE_METHODS
    needed = [student, *teachers] if teaches else [student]
    unknown = [encoder.name for encoder in needed if encoder.config is None]
    if unknown:
        kind = "baseline" if name in recipe.baselines else "stage"
        return [f"scale of {kind} {name}: memory is unknown without the Hub, which knows {' and '.join(unknown)}"]
    scale = stage_scale(recipe, name, stage, student, *teachers)
    steps = stage.steps(train_images(recipe, stage, ask_hub=False))
    lines = [*_heading(scale, steps, recipe.baselines), *_table(scale, steps, question)]
    lines += _missing(scale) + _masking_nothing(scale)
    if scale.shares(question.gpus):
        lines += ["", *_breakdown(scale, question), "", *_verdict(scale, question)]
    else:
        lines += ["", *_cannot_share(scale, question)]
    return lines


def _heading(scale: StageScale, steps: int | None, baselines: list[str]) -> list[str]:
    stage = scale.stage
    precision = "fp32" if stage.precision == "fp32" else "bf16 (weights and optimiser in fp32)"
    work = f"{scale.step_flops(False) / 1e12:,.1f} TFLOP a step"
    if scale.costs[True]:
        work += f" ({scale.step_flops(True) / 1e12:,.1f} with +ac)"
    accumulated = stage.gradient_accumulation_steps
    batch = f"{stage.batch_size} images of {stage.image_size}² a step"
    batch += f" in {accumulated} micro batches" if accumulated > 1 else ""
    lines = [
        f"scale of {scale.title}: {batch}, {'steps unknown' if steps is None else f'{steps:,} steps'}",
        f"  {precision}{_teacher(scale)}",
        f"  {work}",
    ]
    if scale.refuses_fsdp:
        lines.append("  no fsdp2: early_backward does not go with it")
    elif scale.runs_backward_early:
        lines.append("  ddp: activations of one view at a time (early_backward); fsdp2 keeps both views'")
    if scale.name == "task" and baselines:
        lines.append("  no +ac: where there are baselines, activation_checkpointing is for them alone")
    elif scale.costs[True] is None:
        lines.append("  no +ac: nothing that is trained here can compute its activations again")
    return lines


def _teacher(scale: StageScale) -> str:
    shared = scale.shards_teachers(2)
    if len(shared) > 1:
        return f"; {len(shared)} teachers, {sum(shared)} of them sharded from 2 GPUs on"
    if not shared:
        return ""
    return "; teacher sharded from 2 GPUs on" if shared[0] else "; teacher whole on every GPU"


def _columns(layouts: list[Layout]) -> str:
    return "".join(f"{_title(layout):>{_WIDTH}}" for layout in layouts)


def _title(layout: Layout) -> str:
    return ("fsdp2" if layout.fsdp else "ddp") + ("+ac" if layout.checkpointing else "")


def _launch(layout: Layout) -> str:
    return _title(layout) if layout.gpus > 1 else _title(layout).replace("ddp", "single")


def _table(scale: StageScale, steps: int | None, question: ScaleQuestion) -> list[str]:
    columns = list(scale.layouts(2))
    recomputes = scale.costs[True] is not None
    hours = f"{'hours':>10}" + (f"{'hours+ac':>10}" if recomputes else "")
    lines = [f"  {'GPUs':>5}{'images':>8}{hours} {_columns(columns)}"]
    asked = {question.gpus} if scale.shares(question.gpus) else set()
    for gpus in sorted({*rows(scale.stage, LARGEST_RUN)} | asked):
        images = scale.stage.batch_size // gpus // scale.stage.gradient_accumulation_steps
        mark = "!" if scale.masks_nothing(gpus) else ""
        times = "".join(
            f"{_hours(None if steps is None else scale.hours(steps, gpus, again, question)):>10}"
            for again in ((False, True) if recomputes else (False,))
        )
        cells = {(each.fsdp, each.checkpointing): each for each in scale.layouts(gpus)}
        memory = "".join(
            f"{_cell(scale, cells.get((each.fsdp, each.checkpointing)), question):>{_WIDTH}}" for each in columns
        )
        lines.append(f"  {gpus:>5}{f'{mark}{images}':>8}{times} {memory}")
    return lines


def _hours(hours: float | None) -> str:
    if hours is None:
        return "?"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"


def _cell(scale: StageScale, layout: Layout | None, question: ScaleQuestion) -> str:
    if layout is None:
        return "–"
    footprint = scale.footprint(layout)
    return f"{'' if footprint.fits(question.memory) else '*'}{footprint.total / GIGABYTE:.1f}"


def _missing(scale: StageScale) -> list[str]:
    shown = rows(scale.stage, LARGEST_RUN)
    absent = [2**power for power in range(10) if 2**power not in shown]
    if not absent:
        return []
    names = ", ".join(map(str, absent)) if len(absent) < 3 else f"{absent[0]} … {absent[-1]}"
    return [f"  no row for {names}: {_indivisible(scale)}"]


def _masking_nothing(scale: StageScale) -> list[str]:
    if not any(scale.masks_nothing(gpus) for gpus in rows(scale.stage, LARGEST_RUN)):
        return []
    part = scale.stage.mask_probability
    return [f"  ! no image would be masked, {part:g} of so few being less than one; hours and GB are as if some were"]


def _indivisible(scale: StageScale) -> str:
    accumulated = scale.stage.gradient_accumulation_steps
    micro = f" in {accumulated} micro batches each" if accumulated > 1 else ""
    return f"so many GPUs cannot share {scale.stage.batch_size} images evenly{micro}"


def _cannot_share(scale: StageScale, question: ScaleQuestion) -> list[str]:
    accumulated = scale.stage.gradient_accumulation_steps
    most = max(n for n in range(1, question.gpus + 1) if scale.shares(n)) if scale.shares(1) else 0
    hint = f"at most {most} can" if most else "no number of GPUs can"
    share = question.gpus * accumulated
    return [
        f"  {question.gpus} GPUs cannot share the {scale.stage.batch_size} images of a step of {scale.title} evenly: "
        f"{hint};",
        f"  run the stage on fewer, or set stages.{scale.key}.batch_size to a multiple of {share}",
    ]


def _breakdown(scale: StageScale, question: ScaleQuestion) -> list[str]:
    layouts = list(scale.layouts(question.gpus))
    footprints = [scale.footprint(layout) for layout in layouts]
    names = list(dict.fromkeys(name for footprint in footprints for name in footprint.parts))
    order = {name: place for place, name in enumerate(_ORDER)}
    plural = "s" if question.gpus > 1 else ""
    lines = [f"  {f'GB on {question.gpus} GPU{plural}':<{_PART}}{_columns(layouts)}"]
    for name in sorted(names, key=lambda each: order.get(each, len(order))):
        cells = [_part(footprint, name) for footprint in footprints]
        if any(cell.strip("0.–") for cell in cells):
            lines.append(f"  {name:<{_PART}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))
    totals = "".join(f"{footprint.total / GIGABYTE:>{_WIDTH}.2f}" for footprint in footprints)
    moments = "".join(f"{footprint.phase:>{_WIDTH}}" for footprint in footprints)
    lines += [f"  {'total':<{_PART}}{totals}", f"  {'  reached in':<{_PART}}{moments}"]
    work = footprints[0].teacher_work
    if work and footprints[0].phase != "teacher":
        lines.append(f"  the teacher's forward takes {work / GIGABYTE:.2f} GB, and has given it back by then")
    return lines


_ORDER = (
    "student's weights",
    "student's gradients",
    "optimiser's states",
    "weight average",
    "heads",
    "activations",
    "weight copies",
    "teacher's weights",
    "teacher's work",
    "gradient buckets",
    "gathered layers",
    "CUDA and NCCL",
)


def _part(footprint: Footprint, name: str) -> str:
    return f"{footprint.parts[name] / GIGABYTE:.2f}" if name in footprint.parts else "–"


def _verdict(scale: StageScale, question: ScaleQuestion) -> list[str]:
    stage, gpus = scale.stage, question.gpus
    layout = Layout(gpus, stage.gradient_accumulation_steps, False, scale.recomputes)
    setting = f"{gpus} GPU{'s' if gpus > 1 else ''} of {question.memory:g} GB, {_launch(layout)}"
    own, smallest = scale.footprint(layout), scale.smallest(question.memory)
    masking = " and masks an image" if scale.masks_nothing(LARGEST_RUN) else ""
    fewest = (
        f"no number of GPUs up to {LARGEST_RUN} fits as it is{masking}"
        if smallest is None
        else f"the fewest that fit: {smallest.gpus} ({_launch(smallest)})"
    )
    total = own.total / GIGABYTE
    unmasked = []
    if scale.masks_nothing(gpus):
        unmasked = ["  NO IMAGE IS MASKED there: take fewer GPUs or micro batches, or a larger batch_size"]
    if own.fits(question.memory):
        return [f"  {setting}: fits, {total:.1f} GB, {question.memory - total:.1f} GB are left; {fewest}", *unmasked]
    lines = [f"  {setting}: DOES NOT FIT, {total:.1f} GB, {total - question.memory:.1f} GB too much; {fewest}"]
    ways = scale.ways_to_fit(gpus, question.memory)
    if unmasked:
        return lines + unmasked
    if not ways:
        return [*lines, "  nothing helps on so many GPUs: take more of them, a smaller teacher or smaller images"]
    return lines + [f"  fits with {_advice(scale, way)}: {found.total / GIGABYTE:.1f} GB" for way, found in ways]


def _advice(scale: StageScale, layout: Layout) -> str:
    stage, words = scale.stage, []
    if layout.accumulation != stage.gradient_accumulation_steps:
        words.append(f"stages.{scale.key}.gradient_accumulation_steps={layout.accumulation}")
    if layout.checkpointing and not scale.recomputes:
        words.append(f"stages.{scale.key}.activation_checkpointing=true")
    if layout.fsdp:
        words.append("fsdp2.yaml")
    return " and ".join(words)
