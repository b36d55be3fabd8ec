"""Arguments of the two trainers: transformers' own, with the paper's defaults, and the few that are GKD's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from gkd_hf.distillation.objective import OBJECTIVES
from gkd_hf.errors import InputError, nearest
from gkd_hf.teacher import SHARDINGS

PUSH_REFUSED = (
    "push_to_hub=True would upload every checkpoint as it is, with pickles and optimiser state: leave it out and call "
    "trainer.push_to_hub() after trainer.train(), for the finished model and its card"
)
REFERENCE_BATCH = 512  # the stage-1 learning rate is given for this many images


@dataclass
class StageArguments(TrainingArguments):
    """What both stages change in `TrainingArguments`: streams, no clipping, no reports to services, own loss guard."""

    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients at this norm; 0 does not clip."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Streams yield exactly what is used."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A non-finite loss stops the run instead."})
    logging_steps: float = field(default=50, metadata={"help": "Log the mean of every loss term this often."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept in the output folder."})
    report_to: str | list[str] = field(default="none", metadata={"help": "Services to report to."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Passed to DDP."})
    use_cpu: bool = field(
        default_factory=lambda: not torch.accelerator.is_available(),
        metadata={"help": "Train on the CPU; processes launched there join only if they know it."},
    )
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False, "non_blocking": torch.cuda.is_available()},
        metadata={"help": "Accelerate's; by default each process decodes its own samples, and copies do not wait."},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin host memory; only of use with a GPU."}
    )
    sync_batch_norm: bool = field(
        default=False, metadata={"help": "Share batch statistics between processes (CUDA only)."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Keep a moving average of the weights, which is what training gives."}
    )

    def __post_init__(self) -> None:
        if self.push_to_hub:
            raise InputError(PUSH_REFUSED)
        if self.hub_token:
            raise InputError(
                "hub_token would be written into every checkpoint: leave it out, and log in with `hf auth login`, set "
                "HF_TOKEN, or call trainer.push_to_hub(token=…)"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must lie between 0 and 1, both excluded, got {self.ema_decay}")
        if self.save_on_each_node:
            raise InputError(
                "save_on_each_node would write every checkpoint once per host into one folder: leave it out, and take "
                "an output_dir that all hosts share"
            )
        super().__post_init__()
        if self.device.type == "cuda":
            # One process drives one GPU: torch's DataParallel would cut batches away from their masks.
            self._n_gpu = 1
        if self.mixed_precision == "bf16" and not self.bf16:
            raise InputError(
                "accelerate was launched for bf16, these arguments (or the recipe's precision) say fp32: leave "
                "mixed_precision out of accelerate's command and configuration, or choose bf16 here, too"
            )
        if self.fp16 or self.mixed_precision == "fp16":
            raise InputError("fp16 overflows on unscaled attention logits: use bf16, or neither for fp32")
        if self.sync_batch_norm and self.device.type != "cuda":
            raise InputError("sync_batch_norm needs CUDA devices: torch has no synchronised batch norm on the CPU")

    @property
    def global_batch_size(self) -> int:
        """Images per optimiser step, over all processes and accumulation steps."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps


@dataclass
class GKDDistillationArguments(StageArguments):
    """Arguments of stage 1 of GKD (arXiv 2603.02554); the defaults are the paper's.

    Args:
        learning_rate: None takes 5e-4 · global batch / 512. The schedule is a cosine down to ``min_learning_rate``.
        objective: "qsd" (query-based soft distillation), "mse" (LN + Linear heads) or "proteus" (the same heads, and
            the patch loss on masked patches alone).
        mask_probability: part p of a device batch's samples that are seen a second time, masked.
        mask_ratio: part r of their patches that is hidden.
        token_weight, feature_weight, patch_weight: λ of the three losses.
        query_warmup_steps: steps with the query branches off, after which they start as copies of the value branches.
            Students from random weights need it: see ``attention_scale``.
        attention_scale: factor on the attention logits. The paper has none, which makes a random student's attention
            nearly one-hot from the first step.
        teacher_sharding: "always" or "never" share the teacher's weights out to the processes; "auto": from 500
            million parameters on.
        teacher_cache: folder in which teachers' tokens are kept, so that a view that is seen again is not computed
            again. It needs views that come back: a `SampleStream` with ``views``, or samples that do not change.
        early_backward: run the backward pass of the whole images before the forward pass of the masked ones, which
            keeps the activations of one view at a time, and changes the last digits of the gradients' sums. None does
            so on GPUs, unless FSDP2, DeepSpeed or torch.compile, which do not bear it, are at work.
        sync_batch_norm: share batch statistics between processes (CUDA only).

    Raises:
        InputError: a value outside its range; ``early_backward`` with torch.compile; Proteus with a patch loss, and
            nothing masked.
    """

    learning_rate: float | None = field(default=None, metadata={"help": "None: 5e-4 · global batch / 512."})
    min_learning_rate: float = field(default=1e-5, metadata={"help": "Where the cosine ends."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Learning rate schedule."})
    objective: str = field(default="qsd", metadata={"help": "Heads and losses: qsd, mse or proteus."})
    mask_probability: float = field(default=0.5, metadata={"help": "Part of the samples seen masked, in [0, 1]."})
    mask_ratio: float = field(default=0.5, metadata={"help": "Part of their patches that is hidden, in [0, 1)."})
    token_weight: float = field(default=1.0, metadata={"help": "Weight of the class token's loss."})
    feature_weight: float = field(default=1.0, metadata={"help": "Weight of the feature loss."})
    patch_weight: float = field(default=1.0, metadata={"help": "Weight of the masked patch loss."})
    query_warmup_steps: int = field(default=0, metadata={"help": "Steps with the query branches off."})
    attention_scale: float = field(default=1.0, metadata={"help": "Factor on the attention logits."})
    teacher_sharding: str = field(default="auto", metadata={"help": "Share the teacher out: auto, always or never."})
    early_backward: bool | None = field(default=None, metadata={"help": "One view's activations; None: on GPUs."})
    teacher_cache: str | None = field(default=None, metadata={"help": "Folder to keep the teachers' tokens in."})

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            hint = nearest(self.objective, OBJECTIVES)
            raise InputError(f"unknown objective '{self.objective}'{hint} (there are: {', '.join(OBJECTIVES)})")
        if self.teacher_sharding not in SHARDINGS:
            raise InputError(f"unknown teacher_sharding '{self.teacher_sharding}' (there are: {', '.join(SHARDINGS)})")
        if not 0 <= self.mask_probability <= 1:
            raise InputError(f"mask_probability must lie in [0, 1], got {self.mask_probability}")
        if not 0 <= self.mask_ratio < 1:
            raise InputError(f"mask_ratio must lie in [0, 1), got {self.mask_ratio}")
        if self.query_warmup_steps < 0:
            raise InputError(f"query_warmup_steps must be ≥ 0, got {self.query_warmup_steps}")
        if self.query_warmup_steps and self.objective != "qsd":
            raise InputError(
                f"query_warmup_steps needs objective qsd: the heads of {self.objective} have no query branch"
            )
        weights = (self.token_weight, self.feature_weight, self.patch_weight)
        if min(weights) < 0 or not any(weights):
            raise InputError(f"token_weight, feature_weight and patch_weight must be ≥ 0 and not all 0, got {weights}")
        self.check_masked()
        if self.attention_scale <= 0:
            raise InputError(f"attention_scale must be positive, got {self.attention_scale}")
        wanted, self.learning_rate = self.learning_rate, self.learning_rate or 0.0
        super().__post_init__()
        if self.early_backward and self.torch_compile:
            raise InputError("early_backward does not go through torch.compile: leave one of them out")
        self.learning_rate = wanted or 5e-4 * self.global_batch_size / REFERENCE_BATCH
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr": min(self.min_learning_rate, self.learning_rate)}

    def check_masked(self, num_patches: int | None = None) -> None:
        """Raise `InputError` if Proteus, whose patch loss is on masked patches alone, would mask none.

        Args:
            num_patches: N of an image; None where it is not known yet.
        """
        if self.objective != "proteus" or not self.patch_weight:
            return
        batch, nudge = self.per_device_train_batch_size, 1e-9  # as in `random_masks`
        samples = int(self.mask_probability * batch + nudge)
        patches = self.mask_ratio if num_patches is None else int(self.mask_ratio * num_patches + nudge)
        if not samples or not patches:
            of = "the" if num_patches is None else num_patches
            raise InputError(
                f"proteus computes its patch loss on masked patches, and none would be: mask_probability "
                f"{self.mask_probability:g} of a device batch of {batch}, mask_ratio {self.mask_ratio:g} of {of} "
                "patches; raise them, or set patch_weight to 0"
            )


@dataclass
class GKDSegmentationArguments(StageArguments):
    """Arguments of stage 2 of GKD, the task; the defaults are the paper's.

    Args:
        learning_rate: of the decode head; the schedule is a polynomial of power 0.9 down to 0.
        freeze_encoder: keep the encoder as stage 1 left it. False trains it too: the student alone, end to end.
        encoder_learning_rate: of an unfrozen encoder; None takes ``learning_rate``.
        window, stride: sliding window of the evaluation, in pixels.
        window_batch_size: windows per forward.

    Raises:
        InputError: a value outside its range.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the decode head."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Learning rate schedule."})
    freeze_encoder: bool = field(default=True, metadata={"help": "Train the decode head alone."})
    encoder_learning_rate: float | None = field(default=None, metadata={"help": "Of an unfrozen encoder."})
    window: int = field(default=512, metadata={"help": "Sliding window of the evaluation, in pixels."})
    stride: int = field(default=341, metadata={"help": "Step of the sliding window, in pixels."})
    window_batch_size: int = field(default=4, metadata={"help": "Windows per forward in the evaluation."})

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.window:
            raise InputError(f"the window's stride must lie in 1…{self.window} (the window), got {self.stride}")
        if self.freeze_encoder and self.encoder_learning_rate is not None:
            raise InputError("encoder_learning_rate does nothing while freeze_encoder is set: drop one of them")
        if self.lr_scheduler_type == "polynomial" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"power": 0.9, "lr_end": 0.0}
        super().__post_init__()
