"""What the trainers of both stages share: streams read in place, exact resumption, every loss term watched."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from gkd_hf.data.streaming import EvaluationSet, SampleStream
from gkd_hf.errors import InputError
from gkd_hf.hub.run_facts import StageRecorder
from gkd_hf.models.encoder_adapter import lay_out_plainly
from gkd_hf.training import checkpoints
from gkd_hf.training.arguments import StageArguments
from gkd_hf.training.loss_watch import LossWatch
from gkd_hf.training.memory_layout import contiguous, lay_out_models, lay_out_optimizer
from gkd_hf.training.numbered_samples import numbered_samples
from gkd_hf.training.preemption import Preemption
from gkd_hf.training.process_group import check_shared, hung_peer, is_hung_peer, of_main_process
from gkd_hf.training.progress import stage_progress
from gkd_hf.training.publishing_trainer import PublishingTrainer
from gkd_hf.training.sharding import is_sharded, reshard, set_up_sharding, share_buffers, skeleton
from gkd_hf.training.sigterm import Preempted, outliving_sigterm
from gkd_hf.training.skipped_rows import SkippedRows, skipped_rows
from gkd_hf.training.stream_position import StreamPosition
from gkd_hf.training.weight_average import WeightAverage


class NonFiniteLossError(InputError):
    """The loss or the weights are no longer finite numbers; the message names step, terms and last good checkpoint."""


class _NothingToTrain(Exception):
    """Everything is loaded, and the checkpoint was the last one."""


class _StopWhenLoaded(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise _NothingToTrain


class StreamTrainer(PublishingTrainer):
    """A `Trainer` for endless streams.

    - A `SampleStream` is cut for this process here and read as it is: Accelerate would shard it a second time.
    - A resumed run starts the stream at its own position. Nothing that was seen is decoded again.
    - ``compute_loss`` hands its named losses to `watch`: their means are logged, one that is not finite stops the run.
    - A checkpoint is whole or not there. SIGTERM ends the training at a step's end with a checkpoint.
    """

    # Losses are means over a micro batch; Trainer divides them by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: StageArguments,
        train_dataset: torch.utils.data.Dataset,
        eval_dataset: dict[str, EvaluationSet] | None = None,
        *,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        callbacks: list[TrainerCallback] | None = None,
        title: str = "train",
    ):
        if args.sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if isinstance(train_dataset, SampleStream):
            if args.max_steps < 1:
                raise InputError("a SampleStream is endless: say when to stop with max_steps in the arguments")
            args.ignore_data_skip = True  # the stream starts where it should
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            callbacks=callbacks,
        )
        self.skeleton: nn.Module | None = None  # of a sharded model, before it was
        set_up_sharding(self.accelerator)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(stage_progress(title))
        self.title = title
        self.average: WeightAverage | None = None
        if args.ema_decay is not None:
            self.average = WeightAverage(model, args.ema_decay)
            self.add_callback(self.average)
        self.recorder = StageRecorder()
        self.add_callback(self.recorder)
        self._preemption = Preemption()
        self.add_callback(self._preemption)
        self._saving = False
        self._saved_step: int | None = None
        self._start_step = 0
        self._position: StreamPosition | None = None
        if isinstance(train_dataset, SampleStream):
            self._position = StreamPosition(train_dataset, args.global_batch_size)
            self.add_callback(self._position)
        self._losses = LossWatch()
        self._skipped: SkippedRows | None = None

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        super()._move_model_to_device(model, device)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # these lay weights out themselves
            lay_out_models(model)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # The last that happens before Accelerate cuts the model, in place.
        if self.is_fsdp_enabled and not is_sharded(self.model):
            lay_out_plainly(self.model)
            self.skeleton = skeleton(self.model)
        return super()._wrap_model(model, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate or predict as `Trainer` does."""
        output = super().evaluation_loop(*args, **kwargs)
        reshard(self.model)
        return output

    # -- data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Read a `SampleStream` from this run's position, as this process's share; other data sets as Trainer does."""
        if not isinstance(self.train_dataset, SampleStream):
            own_order = type(self)._get_train_sampler is not Trainer._get_train_sampler
            samples = None if own_order else numbered_samples(self.train_dataset, self.args)
            if samples is None:
                loader = super().get_train_dataloader()
            else:
                batch = self.args.per_device_train_batch_size
                loader = self._get_dataloader(
                    samples, "Training", batch, sampler_fn=lambda _: samples.order, is_training=True
                )
            return outliving_sigterm(loader)
        args = self.args
        stream = self.train_dataset.shard(
            args.per_device_train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            start=self._position.start,
        )
        workers = args.dataloader_num_workers
        loader = DataLoader(
            stream,
            batch_size=args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=workers > 0 and args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            # A loader seeds its workers from here; from torch's own generator it would take a number more in a run
            # that is resumed, and what a model draws from it would be other numbers from there on.
            generator=torch.Generator(),
        )
        outliving_sigterm(loader)
        # One process of one: the stream has taken this process's share, and no rank may decode for the others.
        return prepare_data_loader(
            loader,
            device=args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=args.dataloader_pin_memory,  # a pinned batch travels while the last one is computed
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Read as `Trainer` does: an evaluation while training goes on to the checkpoint that a SIGTERM asks for."""
        return outliving_sigterm(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: torch.utils.data.Dataset) -> DataLoader:
        """Read as `Trainer` does, like `get_eval_dataloader`."""
        return outliving_sigterm(super().get_test_dataloader(test_dataset))

    def note_bad_rows(self, rows: list[dict[str, Any]]) -> None:
        """Write rows that could not be read to the output folder at once, where a killed run finds them again.

        A row that is met again is not written again.

        Raises:
            InputError: they are too many, counted over all processes, workers and restarts, or cannot be written.
        """
        if not rows:
            return
        if self._skipped is None:
            self._skipped = SkippedRows(self.args.output_dir, self.args.process_index)
        if self._skipped.add(rows) and isinstance(self.train_dataset, SampleStream):
            self.train_dataset.check_bad_rows(self.bad_rows)

    @property
    def bad_rows(self) -> list[dict[str, Any]]:
        """The distinct rows that were skipped in this folder's run, over all processes and restarts."""
        return skipped_rows(self.args.output_dir)

    # -- the run ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train to ``max_steps``. With ``ema_decay`` the model then holds the average of its weights.

        A checkpoint of a later step than the one a run goes on from is removed when the run has saved its next one.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last whole one of the output folder, if any. A
                training that goes on from none in its output folder begins in one that holds none.

        Raises:
            InputError: no such checkpoint, or one of other data or another seed; every checkpoint is damaged; a
                training is to begin in a folder that holds checkpoints of another; the output folder cannot be
                written or is not shared by all hosts; a process gives no answer.
            NonFiniteLossError: the loss left the finite numbers.
            Preempted: SIGTERM came; a checkpoint is saved. Without one, as at the end of a training that saves none,
                the trained model is there and train returns.
        """
        with self._preemption.watching():
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            self._start_step = checkpoints.checkpoint_step(checkpoint) if checkpoint else 0
            own = checkpoint and Path(checkpoint).parent.absolute() == Path(self.args.output_dir).absolute()
            self._saved_step = self._start_step if own else None
            if self._position is not None:
                self._position.begin(checkpoint)
            if checkpoint is None and self.is_world_process_zero():
                for path in Path(self.args.output_dir).glob("bad_rows.*.jsonl"):
                    path.unlink()
            self._skipped = None
            if self.average is not None:
                self.average.forget()
            output = self._train_from(checkpoint, **kwargs)
            if self._preemption.agree(self.args):
                self._preempted()
        if self.average is not None:
            self.average.give()
            self.average.forget()
        return output

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """The main process decides for all; it tells of checkpoints that are damaged."""
        args = self.args
        check_shared(args.output_dir)
        checkpoint = None
        if self.is_world_process_zero():
            checkpoints.clear_saving(args.output_dir)
            if wanted is True:
                found = checkpoints.checkpoint_to_resume(args.output_dir)
                if found.passed_over:
                    print(found.told(), file=sys.stderr, flush=True)
                checkpoint = None if found.checkpoint is None else str(found.checkpoint)
            elif wanted:
                checkpoint = os.fspath(wanted)
                checkpoints.check_whole(checkpoint)
            if checkpoint is not None:
                checkpoints.check_resumable(checkpoint, self._engine, args.world_size)
            if checkpoint is None or Path(checkpoint).resolve().parent != Path(args.output_dir).resolve():
                checkpoints.check_fresh(args.output_dir)
        return of_main_process(checkpoint)

    @property
    def _engine(self) -> str:
        return "deepspeed" if self.is_deepspeed_enabled else "fsdp" if self.is_fsdp_enabled else "plain"

    def _train_from(self, checkpoint: str | None, **kwargs: Any) -> TrainOutput:
        # Killed between its last checkpoint and the end: Trainer would train one more step.
        ends = [_StopWhenLoaded()] if checkpoint and 0 < self.args.max_steps <= self._start_step else []
        for callback in ends:
            self.add_callback(callback)
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except _NothingToTrain:
            self.is_in_train = False
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            return TrainOutput(self._start_step, 0.0, {})
        except RuntimeError as error:
            if not is_hung_peer(error):
                raise
            where = f"in step {self.state.global_step + 1} of {self.title}"
            raise hung_peer(error, where, timedelta(seconds=self.args.ddp_timeout)) from error
        finally:
            for callback in ends:
                self.remove_callback(callback)

    def _preempted(self) -> None:
        saved = self._saved_step == self.state.global_step
        if self.is_world_process_zero():
            place = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            then = (
                f"saved {place}; the same command goes on from there" if saved else "came when the training was done"
            )
            print(f"SIGTERM: {then}", file=sys.stderr, flush=True)
        if saved:
            raise Preempted

    def averaged(self) -> AbstractContextManager[None]:
        """In this context the model is what training would give if it ended here."""
        return self.average.given() if self.average is not None else nullcontext()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._engine == "plain":
            lay_out_optimizer(self.optimizer)
        if self.average is not None and checkpoint is not None:
            self.average.load(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:  # what training gives is the average, and what was best is the average of then
            self.average.load(self.state.best_model_checkpoint)

    def create_accelerator_and_postprocess(self) -> None:
        """Set up Accelerate as `Trainer` does; DeepSpeed gets the mixed precision that all other engines have."""
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled and self.args.bf16:
            # DeepSpeed's own bf16 makes the model bf16, batch statistics included, and leaves its inputs as they are.
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config |= {
                "bf16": {"enabled": False},
                "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
            }
            plugin.hf_ds_config._dtype = torch.float32

    def autocast(self) -> AbstractContextManager:
        """The context in which models compute in this run's precision."""
        if self.is_deepspeed_enabled:  # Accelerate leaves this to DeepSpeed, which does it for the trained model alone
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule as `Trainer` does, also of an optimiser that DeepSpeed has wrapped."""
        if optimizer is None and self.is_deepspeed_enabled:
            # Schedules with a floor ask for the first learning rate, which DeepSpeed's wrapper does not pass on.
            wrapper = self.optimizer.optimizer
            wrapper.defaults = wrapper.optimizer.defaults
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Biases and everything of one dimension or none is not decayed (GKD's recipe)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        """Look at the gradients' norm where it is logged alone: it takes a pass over them, and over all processes."""
        if grad_norm is None and not self._is_logged():
            return None
        return super()._get_grad_norm(model, grad_norm)

    def _is_logged(self) -> bool:
        """Whether the end of this step logs, as far as its number tells."""
        args, step = self.args, self.state.global_step + 1
        if args.logging_strategy != "steps":
            return args.logging_strategy == "epoch"
        first = step == 1 and args.logging_first_step
        return first or step % max(1, int(self.state.logging_steps)) == 0

    # -- losses -------------------------------------------------------------------------------------------------------

    def watch(self, losses: dict[str, torch.Tensor]) -> None:
        """Add a micro batch's named losses, ``total`` among them, to the means that are logged next.

        The first that is not finite stops the run; on a GPU it is looked for before the next log or save.
        """
        self._losses.add(losses, self.state.global_step + 1)
        if losses["total"].device.type == "cpu":
            self._stop_if_not_finite()

    def _stop_if_not_finite(self) -> None:
        bad = self._losses.first_not_finite()
        if bad is not None:
            self._stop(f"the loss is not finite at {bad}")

    def _stop(self, what: str) -> None:
        good = checkpoints.last_complete_checkpoint(self.args.output_dir)
        place = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise NonFiniteLossError(f"{what}; {place}. Lower learning_rate, or run in fp32 if this was bf16.")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean of every loss term since the last time, over all processes."""
        self._stop_if_not_finite()
        if "loss" in logs:
            means = self._losses.means(lambda own: self.accelerator.reduce(own, reduction="mean"))
            if means:
                logs["loss"] = means.pop("total")
                logs.update({f"loss_{name}": value for name, value in means.items()})
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if state_dict is None and self.args.should_save:  # a plain module's go to safetensors as they are
            state_dict = self.model.state_dict()
        super()._save(output_dir, None if state_dict is None else contiguous(state_dict))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint of broken weights would be resumed from for ever.
        self._stop_if_not_finite()
        norm = nn.utils.get_total_norm([parameter.detach() for parameter in self.model.parameters()])
        if not torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
            self._stop(f"the weights are not finite after step {self.state.global_step}")
        if is_sharded(self.model):
            share_buffers(self.model)
        folder = super()._get_output_dir(trial)
        with checkpoints.refused_writes(folder, self.state.global_step, self.is_world_process_zero()):
            self._save_whole(model, trial, folder)

    def _save_whole(self, model: nn.Module, trial: Any, folder: str) -> None:
        args, step = self.args, self.state.global_step
        if self.is_world_process_zero():
            checkpoints.clear_saving(folder)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            if self.average is not None:
                place = os.path.join(self._get_output_dir(trial), f"checkpoint-{step}")
                self.average.save(place, self.is_world_process_zero())
        finally:
            self._saving = False
        best = self.state.best_model_checkpoint
        if best is not None:
            best = self.state.best_model_checkpoint = os.path.join(folder, os.path.basename(best))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.state.save_to_json(os.path.join(folder, checkpoints.SAVING, f"checkpoint-{step}", TRAINER_STATE_NAME))
            checkpoints.put_in_place(folder, step, self._engine, args.world_size)
            checkpoints.rotate(folder, step, args.save_total_limit, best)
        self.accelerator.wait_for_everyone()
        self._saved_step = step

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, checkpoints.SAVING) if self._saving else folder
