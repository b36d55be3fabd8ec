"""Train the small teacher that ships with the package, and measure it.

    python scripts/train_toy_teacher.py --precision bf16                  # as shipped: two cores with AMX
    python scripts/train_toy_teacher.py                                   # the same in fp32, on any CPU
    python scripts/train_toy_teacher.py --steps 30 --views 512 --output /tmp/teacher
    python scripts/train_toy_teacher.py --evaluate                        # the shipped one, beside a small CNN alone

What this teacher has seen: it is LABEL-PRIVILEGED. It was supervised with the renderer's own fine parts (20 of them)
and depth over views of the broad ``pool`` style of the toy city, so it knows the classes it is later asked for. That
is unlike DINOv2 and every other teacher trained on photographs without labels: numbers obtained with it show that
distillation transports robustness at toy scale, and say nothing about published results. It has never seen the target
styles (night, fog, rain, snow at full strength, the other city), nor a single image of ``clear_day``.

The output is a plain ``transformers`` ``Dinov2Model`` (patch 8, width 192, 4 blocks, 64 pixels) in fp16 safetensors.
The supervision is read linearly from ``last_hidden_state``, the tokens after the final LayerNorm: patch tokens answer
for every pixel of their patch, the class token for how much of each part is in the picture and in its quarters.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from gkd_hf.data.toy_city import CLASSES, PARTS, SOURCE_STYLE, TARGET_STYLES, render
from gkd_hf.evaluation.mean_iou import confusion_counts

SIZE, PATCH = 64, 8
GRID = SIZE // PATCH
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHIPPED = Path(__file__).resolve().parents[1] / "gkd_hf" / "assets" / "toy_teacher"


def _render_range(job: tuple[str, int, int, int]) -> tuple[np.ndarray, ...]:
    style, start, count, seed = job
    images, labels, extras = render(style, count, size=SIZE, seed=seed, start=start, extras=True)
    return images, labels, extras["parts"], extras["depth"].astype(np.float16)


def views(style: str, count: int, seed: int, workers: int) -> tuple[torch.Tensor, ...]:
    """Render ``count`` views in ``workers`` processes: images, labels, parts, depth as tensors."""
    jobs = [(style, start, min(256, count - start), seed) for start in range(0, count, 256)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        columns = zip(*pool.imap(_render_range, jobs), strict=True)
        return tuple(torch.from_numpy(np.concatenate(column)) for column in columns)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """uint8 ``B × H × W × 3`` to normalised float32 ``B × 3 × H × W``."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def patchified(maps: torch.Tensor) -> torch.Tensor:
    """``B × H × W`` to ``B × N × P²`` in the order of the patch tokens."""
    cut = maps.reshape(len(maps), GRID, PATCH, GRID, PATCH).transpose(2, 3)
    return cut.reshape(len(maps), GRID * GRID, PATCH * PATCH)


class Supervision(nn.Module):
    """Linear read-outs of the final tokens, and their loss."""

    def __init__(self, width: int, part_weight: torch.Tensor) -> None:
        super().__init__()
        self.parts = nn.Linear(width, PATCH * PATCH * len(PARTS))
        self.depth = nn.Linear(width, PATCH * PATCH)
        self.amounts = nn.Linear(width, 6 * len(PARTS))
        self.register_buffer("part_weight", part_weight)

    def forward(
        self,
        tokens: torch.Tensor,
        parts: torch.Tensor,
        depth: torch.Tensor,
        amounts: torch.Tensor,
        pixels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Loss terms; only the in-patch positions ``pixels`` are scored, which costs less and is unbiased."""
        patches, count = tokens[:, 1:], len(PARTS)
        weight = self.parts.weight.view(PATCH * PATCH, count, -1)[pixels].flatten(0, 1)
        bias = self.parts.bias.view(PATCH * PATCH, count)[pixels].flatten()
        scores = functional.linear(patches, weight, bias).reshape(-1, count)
        seen = functional.cross_entropy(scores, patchified(parts)[..., pixels].reshape(-1), self.part_weight)
        far = functional.smooth_l1_loss(self.depth(patches), patchified(depth.log()) / 2)
        told = self.amounts(tokens[:, 0])
        presence = functional.binary_cross_entropy_with_logits(told[:, :count], (amounts[:, :count] > 0.03).float())
        amount = functional.mse_loss(told[:, count:], amounts)
        return {"parts": seen, "depth": far, "presence": presence, "amount": amount}


def part_amounts(parts: torch.Tensor) -> torch.Tensor:
    """Square roots of each part's share of the picture and of its four quarters: ``B × 5·parts``."""
    half = SIZE // 2
    cells = parts.reshape(-1, 2, half, 2, half).transpose(2, 3).reshape(len(parts) * 4, half * half).long()
    shares = torch.zeros(len(cells), len(PARTS)).scatter_add_(1, cells, torch.ones(cells.shape)) / half**2
    shares = shares.view(len(parts), 4, len(PARTS))
    return torch.cat([shares.mean(1, keepdim=True), shares], dim=1).flatten(1).sqrt()


def train(options: argparse.Namespace) -> Dinov2Model:
    begin = time.perf_counter()
    images, _, parts, depth = views("pool", options.views, 1000, options.workers)
    print(f"rendered {len(images)} pool views in {time.perf_counter() - begin:.0f} s", flush=True)
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=PATCH,
        mlp_ratio=4,
        use_swiglu_ffn=False,
        layer_norm_eps=1e-6,
        attn_implementation="eager",  # on 65 tokens faster than the fused kernel, forward and backward
    )
    teacher = Dinov2Model(config)
    frequency = torch.bincount(parts.flatten()[::17].long(), minlength=len(PARTS)).float()
    weight = (frequency.sum() / frequency.clamp(min=1)).pow(0.35)
    supervision = Supervision(config.hidden_size, weight / weight.mean())
    parameters = [*teacher.parameters(), *supervision.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.03, betas=(0.9, 0.98))

    def schedule(step: int) -> float:
        return min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
    amounts = torch.cat([part_amounts(some) for some in parts.split(1000)])
    generator, order = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.long)
    begin = time.perf_counter()
    for step in range(1, options.steps + 1):
        if len(order) < options.batch_size:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        pixels, part, far = normalised(images[chosen]), parts[chosen].long(), depth[chosen].float()
        amount = amounts[chosen]
        if torch.rand((), generator=generator) < 0.5:
            pixels, part, far = pixels.flip(3), part.flip(2), far.flip(2)
            amount = amount.view(-1, 5, len(PARTS))[:, [0, 2, 1, 4, 3]].flatten(1)  # the quarters change sides
        scored = torch.randperm(PATCH * PATCH, generator=generator)[:20]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            tokens = teacher(pixels).last_hidden_state
        losses = supervision(tokens.float(), part, far, amount, scored)
        total = losses["parts"] + losses["depth"] + 0.5 * losses["presence"] + 4 * losses["amount"]
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        scheduler.step()
        if step % 20 == 0 or step == options.steps:
            terms = " ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            print(f"step {step}/{options.steps} {time.perf_counter() - begin:.0f} s {terms}", flush=True)
        if step % 400 == 0 or step == options.steps:
            save(teacher, options.output)
    return teacher


def save(teacher: Dinov2Model, folder: Path) -> None:
    """Write config, fp16 weights and image statistics as ``from_pretrained`` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher.config.save_pretrained(folder)
    weights = {name: value.detach().half().contiguous() for name, value in teacher.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


class Head(nn.Module):
    """The small convolutional head that both the teacher and the CNN get: ``B × C × 8 × 8`` to ``B × K × 64 × 64``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, 128, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(128, 32 * 16, 1),
            nn.PixelShuffle(4),
            nn.GELU(),
            nn.Conv2d(32, len(CLASSES), 3, padding=1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(self.layers(features), size=(SIZE, SIZE), mode="bilinear")


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.layers(features)


def small_cnn() -> nn.Module:
    """A from-scratch residual network of 0.5 M parameters at stride 8."""
    layers: list[nn.Module] = []
    for narrow, wide in ((3, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), Residual(wide)]
    return nn.Sequential(*layers, Residual(96), nn.BatchNorm2d(96), nn.ReLU())


def per_style(encode, encoder_parameters: list, width: int, steps: int, workers: int, rate: float) -> dict[str, float]:  # noqa: ANN001
    """Train a head (and the encoder when it has parameters) on ``clear_day``; mIoU in percent by style."""
    torch.manual_seed(0)
    images, labels, _, _ = views(SOURCE_STYLE, 1500, 0, workers)
    head = Head(width)
    parameters = [*head.parameters(), *encoder_parameters]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 20), pct_start=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,))
        pixels, label = normalised(images[chosen]), labels[chosen].long()
        if torch.rand(()) < 0.5:
            pixels, label = pixels.flip(3), label.flip(2)
        loss = functional.cross_entropy(head(encode(pixels, True)), label)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        scheduler.step()
    scores = {}
    for style in (SOURCE_STYLE, *TARGET_STYLES):
        images, labels, _, _ = views(style, 300, 77, workers)
        counts = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
        with torch.inference_mode():
            for image, label in zip(images.split(50), labels.split(50), strict=True):
                prediction = head(encode(normalised(image), False)).argmax(1)
                counts += confusion_counts(prediction, label.long(), len(CLASSES))
        union = counts.sum(0) + counts.sum(1) - counts.diag()
        by_class = 100 * counts.diag() / union.clamp(min=1)
        scores[style] = by_class[union > 0].mean().item()
        classes = " ".join(f"{name}:{iou:.0f}" for name, iou in zip(CLASSES, by_class, strict=True))
        print(f"  {style:11s} {scores[style]:5.1f}  {classes}", flush=True)
    scores["unseen"] = sum(scores[style] for style in TARGET_STYLES) / len(TARGET_STYLES)
    print(f"  mean of the unseen styles {scores['unseen']:.1f}", flush=True)
    return scores


def evaluate(options: argparse.Namespace) -> None:
    teacher = Dinov2Model.from_pretrained(options.output, dtype=torch.float32).eval()
    weights = load_file(options.output / "model.safetensors")
    bad = [name for name, value in weights.items() if not value.isfinite().all()]
    if bad:
        raise SystemExit(f"{options.output}: weights are not finite: {bad}")

    def tokens(pixels: torch.Tensor, training: bool) -> torch.Tensor:
        with torch.no_grad():
            patches = teacher(pixels).last_hidden_state[:, 1:]
        return patches.transpose(1, 2).reshape(len(pixels), -1, GRID, GRID)

    print("frozen teacher, head learnt on clear_day")
    per_style(tokens, [], teacher.config.hidden_size, options.task_steps, options.workers, 2e-3)
    torch.manual_seed(0)
    network = small_cnn()
    print(f"small CNN alone ({sum(p.numel() for p in network.parameters()) / 1e6:.2f} M), clear_day, end to end")

    def features(pixels: torch.Tensor, training: bool) -> torch.Tensor:
        return network.train(training)(pixels)

    per_style(features, list(network.parameters()), 96, options.task_steps, options.workers, 3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="measure the teacher in --output, train nothing")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="folder of the teacher")
    parser.add_argument("--views", type=int, default=20000, help="rendered pool views")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 needs a CPU with AMX")
    parser.add_argument("--task-steps", type=int, default=800, help="steps of 32 images for each measured head")
    parser.add_argument("--workers", type=int, default=2, help="rendering processes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.evaluate:
        train(options)
    evaluate(options)


if __name__ == "__main__":
    main()
