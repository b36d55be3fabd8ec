"""Stage 2 of GKD: learn the task on the source's labels with the encoder frozen, then measure every domain."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback, default_data_collator
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from gkd_hf.data.bad_rows import check_bad_rows
from gkd_hf.data.streaming import EvaluationSet, SampleStream, collate, collate_evaluation
from gkd_hf.errors import InputError
from gkd_hf.evaluation.domain_report import DomainResult
from gkd_hf.evaluation.mean_iou import MeanIoU, confusion_counts
from gkd_hf.evaluation.sliding_window import predict_each
from gkd_hf.hub.run_facts import RunFacts
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation
from gkd_hf.training.arguments import GKDSegmentationArguments
from gkd_hf.training.artefacts import write_segmenter
from gkd_hf.training.progress import no_bar
from gkd_hf.training.sharding import under, whole_model
from gkd_hf.training.sigterm import outliving_sigterm
from gkd_hf.training.stream_trainer import StreamTrainer

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class GKDSegmentationTrainer(StreamTrainer):
    """`Trainer` of GKD's stage 2 (arXiv 2603.02554).

    The encoder stays frozen, in eval mode and without gradients; only the decode head is optimised. With
    ``freeze_encoder=False`` it is the ordinary end-to-end training that GKD is compared with.

    Args:
        model: the segmenter. args: the paper's recipe by default.
        train_dataset: a `SampleStream` with labels, whose uint8 pixels are normalised on the device, or any data set
            of ``pixel_values`` 3×H×W, normalised, and ``labels`` H×W.
        eval_dataset: one `EvaluationSet` per domain.
    """

    _tag_names = ["gkd", "semantic-segmentation"]
    artefact = "segmenter"
    encoder_prefix = "student."

    def __init__(
        self,
        model: GKDStudentForSemanticSegmentation,
        args: GKDSegmentationArguments,
        train_dataset: torch.utils.data.Dataset,
        eval_dataset: dict[str, EvaluationSet] | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        title: str = "task",
    ):
        model.freeze_encoder(args.freeze_encoder)
        if args.activation_checkpointing:
            model.check_activation_checkpointing()
        collator = collate if isinstance(train_dataset, SampleStream) else default_data_collator
        if args.torch_compile:
            # An encoder's first call sets up how it tells its hidden states, which would break the graph.
            maybe_install_capturing_hooks(model.student.encoder)
        super().__init__(
            self.trained(model),
            args,
            train_dataset,
            dict(eval_dataset or {}),
            data_collator=collator,
            callbacks=callbacks,
            title=title,
        )

    def trained(self, model: GKDStudentForSemanticSegmentation) -> nn.Module:
        """Return the module that is trained; `segmenter_of` finds the segmenter in it."""
        return model

    def segmenter_of(self, trained: nn.Module) -> GKDStudentForSemanticSegmentation:
        """Return the segmenter in what `trained` returned, or in a copy of it."""
        return trained

    @property
    def segmenter(self) -> GKDStudentForSemanticSegmentation:
        """The segmenter that is trained."""
        return self.segmenter_of(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the segmentation loss of a micro batch; its terms are logged."""
        self.note_bad_rows(inputs.get("bad_rows", []))
        streamed = isinstance(self.train_dataset, SampleStream)
        pixels = self.train_dataset.normalised(inputs) if streamed else inputs["pixel_values"]
        losses = self.losses(model, pixels, inputs)
        self.watch(losses)
        return (losses["total"], losses) if return_outputs else losses["total"]

    def losses(self, model: nn.Module, pixels: torch.Tensor, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the named losses of B×3×H×W normalised pixels, ``total`` among them; the batch has B×H×W labels."""
        with self.autocast():
            outputs = model(pixel_values=pixels, labels=inputs["labels"].long())
        return {"total": outputs.loss, **(outputs.loss_terms or {})}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Norms, and the query and level embeddings of Mask2Former, are not decayed."""
        spared = set()
        for name, module in model.named_modules():
            if isinstance(module, (*_NORMS, nn.Embedding)):
                spared.update(f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False))
        return [n for n, _ in model.named_parameters() if n not in spared and not n.endswith("level_embed")]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give an unfrozen encoder its own learning rate, if it has one."""
        if self.optimizer is not None or self.args.encoder_learning_rate is None:
            return super().create_optimizer(model)
        model = model or self.model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name.startswith(self.encoder_prefix), name in decayed), []).append(parameter)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                    "lr": self.args.encoder_learning_rate if of_encoder else self.args.learning_rate,
                }
                # the head first: Trainer logs the first group's learning rate
                for (of_encoder, decay), parameters in sorted(groups.items(), key=lambda item: item[0][0])
            ],
            **settings,
        )
        return self.optimizer

    def card_settings(self) -> dict[str, Any]:
        """What a card can tell, in a recipe's keys: a trained encoder is that of method none."""
        return super().card_settings() | ({} if self.args.freeze_encoder else {"method": "none"})

    # -- for others ---------------------------------------------------------------------------------------------------

    def export(self, folder: str | os.PathLike, facts: RunFacts, image_size: int) -> None:
        """Write the segmenter to a folder, natively where transformers has a class; every process must call it."""
        model = self.segmenter_of(whole_model(self))
        if self.is_world_process_zero():
            write_segmenter(Path(folder), model, facts, image_size)

    def write_model(self, folder: str | os.PathLike, weights: dict[str, torch.Tensor]) -> None:
        """Write the segmenter to a folder."""
        prefix = self.encoder_prefix.removesuffix("student.")
        self.segmenter.save_pretrained(folder, state_dict=under(prefix, weights) if prefix else weights)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.model is not self.segmenter:  # Trainer saves a plain module's weights by the names they have in it
            super()._save(output_dir, state_dict)
        # Of a transformers model it would save them under the names that published encoders have, load by those of
        # the modules, and go on without what it did not find.
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        strange = [*load_result.missing_keys, *load_result.unexpected_keys]
        if strange:
            raise InputError(
                f"cannot resume: {len(strange)} weights of the checkpoint and of the model do not match, the first is "
                f"{strange[0]}; was it written by another version? Remove the checkpoint to start the stage again"
            )

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: dict[str, EvaluationSet] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return ``eval_{domain}_miou`` of every domain and their mean ``eval_mean_miou``, in percent."""
        results = self.evaluate_domains(eval_dataset, examples=0)
        metrics = {}
        for name, result in results.items():
            metric = MeanIoU(num_labels=self.segmenter.config.num_labels)
            metric.merge(result.confusion)
            metrics[f"{metric_key_prefix}_{name}_miou"] = 100 * metric.compute()["mean_iou"]
        if metrics:
            metrics[f"{metric_key_prefix}_mean_miou"] = sum(metrics.values()) / len(metrics)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_domains(
        self, eval_dataset: dict[str, EvaluationSet] | None = None, examples: int = 1
    ) -> dict[str, DomainResult]:
        """Segment every image of every domain at its test size by sliding windows; count against the native labels.

        Each process takes its share of the images; every process gets the full counts. The shares differ in length, so
        a sharded model, whose forward needs all processes, is gathered first.

        Args:
            eval_dataset: other sets than the trainer's own.
            examples: images kept for the report's figure, per domain.
        """
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        with self.averaged():
            model = self.segmenter_of(whole_model(self)).to(self.args.device).eval()
            return {name: self._evaluate_domain(model, name, images, examples) for name, images in sets.items()}

    @torch.no_grad()
    def _evaluate_domain(
        self, model: GKDStudentForSemanticSegmentation, name: str, images: EvaluationSet, examples: int
    ) -> DomainResult:
        args = self.args
        images = images.shard(args.process_index, args.world_size, pictures=examples)
        loader = DataLoader(
            images,
            batch_size=args.per_device_eval_batch_size,
            collate_fn=collate_evaluation,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )
        outliving_sigterm(loader)  # one of evaluations while training goes on to a checkpoint
        classes = model.config.num_labels
        counts = torch.zeros(classes, classes, dtype=torch.int64, device=args.device)
        seen, kept, skipped = 0, [], []
        quiet = args.disable_tqdm or args.process_index > 0 or no_bar()
        bar = tqdm(total=images.share, desc=name, unit="image", disable=quiet, leave=False)
        for batch in loader:
            bar.update(len(batch["labels"]) + len(batch["bad_rows"]))
            skipped.extend(batch["bad_rows"])
            labels = batch["labels"]
            predictions = self._predictions(model, images, batch["pixel_values"], [label.shape for label in labels])
            for image, truth, prediction in zip(batch["image"], labels, predictions, strict=True):
                counts += confusion_counts(prediction, truth.to(args.device, non_blocking=True), classes)
                if len(kept) < examples:
                    kept.append((image, truth.numpy().astype("uint8"), prediction.cpu().numpy().astype("uint8")))
            seen += len(labels)
        bar.close()
        counts = self.accelerator.reduce(counts, reduction="sum")
        shares = gather_object([(seen, kept, skipped)])
        seen, skipped = sum(share[0] for share in shares), [row for share in shares for row in share[2]]
        check_bad_rows(name, skipped, seen + len(skipped), images.bad_row_limit)
        return DomainResult(
            domain=images.domain,
            confusion=counts.cpu(),
            images=seen,
            skipped=skipped,
            examples=[example for share in shares for example in share[1]][:examples],
        )

    def _predictions(
        self,
        model: GKDStudentForSemanticSegmentation,
        images: EvaluationSet,
        pixels: torch.Tensor | list[torch.Tensor],
        sizes: list[tuple[int, int]],
    ) -> Iterator[torch.Tensor]:
        """Yield the classes of one image of ``images`` after the other at its label's size, as small integers.

        Their pixels are uint8 B×3×H×W, or a list of 3×H×W; sizes are (height, width).
        """

        def scores(crops: torch.Tensor) -> torch.Tensor:
            # The precision of the training, whether the model has just been trained or was loaded for this.
            with self.autocast():
                return model(pixel_values=crops).logits

        groups = [(pixels, sizes)]
        if not isinstance(pixels, torch.Tensor):
            groups = [(image[None], [size]) for image, size in zip(pixels, sizes, strict=True)]
        for group, own in groups:
            yield from predict_each(
                scores,
                images.normalised(group.to(self.args.device, non_blocking=True)),
                own,
                window=self.args.window,
                stride=self.args.stride,
                batch_size=self.args.window_batch_size,
                # as narrow as the labels are: so they are counted fastest
                dtype=torch.uint8 if model.config.num_labels <= 256 else torch.int64,
            )
