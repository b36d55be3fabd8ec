"""A recipe, run: the label-free stages one after the other, the task, the baselines, the evaluation, the report.

Everything can be interrupted anywhere. The same recipe goes on where it stood: a finished stage is not run again, an
interrupted one continues from its last complete checkpoint. So that this changes no weight, a stage never takes over
anything from the memory of the one before, only what that one saved, and seeds itself.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
import warnings
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from gkd_hf.data.streaming import SampleStream
from gkd_hf.data.transforms import DistillationTransform, SegmentationTransform
from gkd_hf.errors import InputError
from gkd_hf.evaluation.domain_report import DomainReport, DomainResult, package_versions
from gkd_hf.hub.model_card import report_table
from gkd_hf.hub.push import check_finished, check_push_rights, push_run, repo_ids, write_cards
from gkd_hf.hub.run_facts import FACTS_NAME, RunFacts, StageFacts, command_line
from gkd_hf.methods import LABEL_FREE_METHODS, ONE_STAGE_METHODS
from gkd_hf.models.encoders import common_grid
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.arguments import GKDDistillationArguments, GKDSegmentationArguments
from gkd_hf.training.artefacts import resolved_commits, same_settings, write_encoder, write_segmenter
from gkd_hf.training.checks import check_grids, check_output_dir, lock_output_dir, train_steps
from gkd_hf.training.distillation_trainer import GKDDistillationTrainer
from gkd_hf.training.one_stage import (
    TEACHER_HEAD,
    check_one_stage,
    new_method,
    new_teacher,
    teacher_as_student,
    teacher_source,
)
from gkd_hf.training.one_stage_trainer import GKDOneStageTrainer
from gkd_hf.training.process_group import check_shared, join_process_group, wait_patiently
from gkd_hf.training.progress import bars_are_seen, duration
from gkd_hf.training.recipe import DistillationRecipe, Recipe, StageRecipe, TaskRecipe, WeightedTeacherRecipe
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.segmentation_trainer import GKDSegmentationTrainer
from gkd_hf.training.sharding import check_can_shard, under, whole_state_dict
from gkd_hf.training.stage_arguments import device_batch, encoder_is_trained, method_of, stage_arguments
from gkd_hf.training.stage_folder import StageFolder
from gkd_hf.training.stage_settings import stage_folders


def run(recipe: Recipe) -> dict[str, Any]:
    """Run or continue a recipe; print the table of results last.

    Returns:
        The content of report.json; without a task stage `{"encoder": folder}`.

    Raises:
        InputError: anything wrong in recipe, models or data, or in the right to push, before any training; afterwards
            more than 1 % unreadable images, a loss that is not finite, or, with everything saved, a push that failed.
    """
    # What is loaded and saved is told by the stages; bars for it would tear the training's bar apart.
    transformers_logging.disable_progress_bar()
    # Loading can warn that tensor parallelism, which nobody asked for, shards nothing.
    logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
    # Gradients of 1×1 convolutions may come in another memory format than DDP's buckets: they are copied, no more.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return Pipeline(recipe).run()


class Pipeline:
    """The stages of one recipe, in this process's share of the run."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.use_cpu = not torch.accelerator.is_available()
        self.state = join_process_group(self.use_cpu, timedelta(minutes=recipe.timeout_minutes))
        self.output_dir = Path(recipe.output_dir)
        self.data = RecipeData(recipe)
        self.folders = stage_folders(recipe, self.data)
        self.facts = RunFacts(
            settings=recipe.as_dict(),
            command=command_line(sys.argv, self.state.num_processes),
            versions=package_versions(),
        )

    def run(self) -> dict[str, Any]:
        """See `run`."""
        with ExitStack() as held:
            return self._run(held)

    def _run(self, held: ExitStack) -> dict[str, Any]:
        recipe = self.recipe
        done = self._finished_before()
        if done is not None:
            return done
        if self.state.is_main_process:
            check_can_shard(self.state)
            check_output_dir(self.output_dir)
            if recipe.hub.repo_id is not None:
                check_push_rights(*repo_ids(recipe.as_dict(), recipe.hub.repo_id))
            self.check_models()
            held.enter_context(lock_output_dir(self.output_dir))
            self.data.render_toy_city(progress=bars_are_seen())
            self.data.check_rows()
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._forget_result()
            recipe.save(self.output_dir)
        # Only the main process downloads and checks, the others wait.
        wait_patiently()
        check_shared(self.output_dir)

        previous: StageFolder | None = None
        for name, stage in recipe.stages.distillation():
            self._distil(name, stage, previous)
            previous = self.folders[name]
        if recipe.stages.task is None:
            return self._finish_without_task(previous)

        if recipe.needs_teacher_head:
            self._learn_teacher_head()
        trainer = self._learn_task("task", previous)
        report = self._report(trainer, previous)
        if self.state.is_main_process:
            size = recipe.stages.task.image_size
            write_encoder(self.output_dir / "encoder", trainer.model.student, self.facts, size)
            write_segmenter(self.output_dir / "segmenter", trainer.model, self.facts, size, report)
            report.write(self.output_dir)
            self._write_cards()
            print(f"\n{report.table()}\n\n{self._closing_words()}", flush=True)
        wait_patiently()
        self._push()
        return report.as_dict()

    # -- before any training ------------------------------------------------------------------------------------------

    def check_models(self) -> None:
        """Load student and teachers and bring them to the geometry of every stage.

        Raises:
            InputError: unknown architecture, unreadable weights, image sizes or grids that do not fit; batch sizes
                that the processes cannot share.
        """
        student, teachers = None, []
        for name, stage in self.recipe.stages:
            device_batch(name, stage, self.state.num_processes)
            train_steps(self.data, name, stage)
            try:
                arguments = self._stage_arguments(name, stage)
                student = student or new_student(self.recipe)
                student.set_geometry(stage.image_size, stage.patch_size)
                if isinstance(stage, DistillationRecipe):
                    teachers = teachers or self._teachers()
                    height, width = check_grids(student, teachers, stage.image_size)
                    arguments.check_masked(height * width)
                    trained = student
                else:
                    for each in self._task_trainings():
                        self._stage_arguments(each, stage)
                    teachers = []  # the last stage: its checks load others
                    self._check_one_stage(student, stage)
                    trained = self._new_segmenter(student, stage)
                    trained.freeze_encoder(
                        not any(encoder_is_trained(self.recipe, each) for each in self._task_trainings())
                    )
                if stage.activation_checkpointing:
                    trained.check_activation_checkpointing()
            except InputError as error:
                raise InputError(f"stages.{name}: {error}") from error
        self.facts.commits = resolved_commits(self.recipe)

    def _check_one_stage(self, student: GKDStudentModel, stage: TaskRecipe) -> None:
        """Bring a teacher of their own to the geometry of the one-stage methods, and build its head."""
        if not self.recipe.one_stage:
            return
        teacher = new_teacher(self.recipe)
        for method in self.recipe.one_stage:
            check_one_stage(self.recipe, method, student, teacher, stage.image_size)
        teacher.fit_geometry(stage.image_size, common_grid(student.adapter, teacher.adapter, stage.image_size))
        if self.recipe.needs_teacher_head:
            del teacher
            try:
                encoder, _ = teacher_as_student(self.recipe, student, stage.image_size)
                self._new_segmenter(encoder, stage)
            except InputError as error:
                raise InputError(f"the teacher's head: {error}") from error

    # -- stages -------------------------------------------------------------------------------------------------------

    def _distil(self, name: str, stage: DistillationRecipe, previous: StageFolder | None) -> None:
        folder = self.folders[name]
        if not self._begin(folder, name, stage):
            return
        set_seed(self.recipe.seed)
        student = self._student_after(previous, stage)
        arguments = self._stage_arguments(name, stage)
        transform = DistillationTransform(
            stage.image_size,
            student.config.image_mean,
            student.config.image_std,
            crop_scale=tuple(stage.crop_scale),
            rand_augment=stage.rand_augment,
            erase_probability=stage.erase_probability,
        )
        stream = self.data.stream(stage, transform, arguments.per_device_train_batch_size)
        trainer = GKDDistillationTrainer(student, self._teachers(), arguments, stream, title=name)
        if previous is not None and stage.carry_heads:
            trainer.objective.load_state_dict(load_file(previous.heads))
        self._train(trainer, folder)
        if trainer.cache is not None and self.state.is_main_process:
            print(f"[{name}] {trainer.cache.told()}", flush=True)

    def _learn_task(self, name: str, previous: StageFolder | None) -> GKDSegmentationTrainer:
        """Train the segmenter of the task stage or of a baseline, unless that is done; return what evaluates it."""
        stage, folder, baseline = self.recipe.stages.task, self.folders[name], name != "task"
        title = f"baseline {name}" if baseline else name
        untrained = self._begin(folder, title, stage)
        set_seed(self.recipe.seed)
        if untrained:
            method = method_of(self.recipe, name)
            model = self._new_segmenter(self._student_after(previous, stage), stage)
            arguments, stream = self._task_training(name, model, stage.image_size)
            if method in ONE_STAGE_METHODS:
                head = self.folders[TEACHER_HEAD].model if TEACHER_HEAD in self.folders else None
                teacher = new_teacher(self.recipe, head)
                losses = new_method(self.recipe, method, model.student, teacher, model.config.num_labels)
                trainer = GKDOneStageTrainer(model, losses, teacher, arguments, stream, title=title)
            else:
                trainer = GKDSegmentationTrainer(model, arguments, stream, title=title)
            self._train(trainer, folder)
        # What is measured is what was saved, whether it has just been trained or not.
        model = GKDStudentForSemanticSegmentation.from_pretrained(folder.model)
        mean, std = model.config.image_mean, model.config.image_std
        arguments, stream = self._task_training(name, model, stage.image_size)
        sets = {domain: self.data.evaluation_set(domain, mean, std) for domain in self.data.evaluated()}
        return GKDSegmentationTrainer(model, arguments, stream, sets, title=title)

    def _learn_teacher_head(self) -> None:
        """Train a head on the frozen teacher with the source's labels, unless that is done."""
        stage, folder = self.recipe.stages.task, self.folders[TEACHER_HEAD]
        if not self._begin(folder, TEACHER_HEAD, stage):
            return
        set_seed(self.recipe.seed)
        student = self._student_after(None, stage)
        encoder, image_size = teacher_as_student(self.recipe, student, stage.image_size)
        model = self._new_segmenter(encoder, stage)
        arguments, stream = self._task_training(TEACHER_HEAD, model, image_size)
        self._train(GKDSegmentationTrainer(model, arguments, stream, title=TEACHER_HEAD), folder)

    def _task_trainings(self) -> list[str]:
        """Names of all that is trained with the task stage's keys."""
        head = [TEACHER_HEAD] if self.recipe.needs_teacher_head else []
        return [*head, "task", *self.recipe.baselines]

    def _task_training(
        self, name: str, model: GKDStudentForSemanticSegmentation, image_size: int
    ) -> tuple[GKDSegmentationArguments, SampleStream]:
        """Arguments and samples of what is trained with the task stage's keys, in crops of ``image_size`` pixels."""
        stage = self.recipe.stages.task
        arguments = self._stage_arguments(name, stage)
        sides = stage.short_sides or [int(stage.image_size * tenths / 10) for tenths in range(5, 21)]
        transform = SegmentationTransform(
            image_size,
            model.config.image_mean,
            model.config.image_std,
            short_sides=tuple(round(side * image_size / stage.image_size) for side in sides),
            max_long_side=4 * image_size,
            max_class_fraction=stage.max_class_fraction,
            photometric=stage.photometric,
        )
        return arguments, self.data.stream(stage, transform, arguments.per_device_train_batch_size)

    def _begin(self, folder: StageFolder, title: str, stage: StageRecipe) -> bool:
        """Say what comes, and return whether there is anything left to train."""
        steps = train_steps(self.data, title, stage)
        what = "finished before" if folder.finished else f"{steps} steps of {stage.batch_size} × {stage.data}"
        if self.state.is_main_process:
            print(f"[{title}] {what}{'' if folder.finished else folder.standing()}", flush=True)
            if not folder.finished:
                folder.begin()
        wait_patiently()
        return not folder.finished

    def _train(self, trainer: GKDDistillationTrainer | GKDSegmentationTrainer, folder: StageFolder) -> None:
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=True)
        # However it was trained, what is kept is one whole model (and its heads, for a stage that carries them on).
        weights = whole_state_dict(trainer)
        heads = {name: tensor.contiguous() for name, tensor in under("objective.", weights).items()}
        wait_patiently()
        if self.state.is_main_process:
            recorder = trainer.recorder
            summary = {
                "steps": trainer.state.global_step,
                "seconds_since_last_start": round(time.monotonic() - began, 1),
                "skipped_rows": trainer.bad_rows,
                "facts": dataclasses.asdict(recorder.facts or recorder.read(trainer.args, trainer.state)),
            }
            if heads:
                save_file(heads, folder.heads)
            folder.finish(lambda place: trainer.write_model(place, weights), summary)
        wait_patiently()

    # -- models and data ----------------------------------------------------------------------------------------------

    def _student_after(self, previous: StageFolder | None, stage: StageRecipe) -> GKDStudentModel:
        student = new_student(self.recipe) if previous is None else GKDStudentModel.from_pretrained(previous.model)
        student.set_geometry(stage.image_size, stage.patch_size)
        return student

    def _teachers(self) -> list[GKDTeacher]:
        # Fresh ones for each stage: resampled kernels must come from the original ones.
        return [
            GKDTeacher(
                teacher_source(each),
                geometry=each.geometry,
                revision=each.revision,
                standardise=each.standardise,
                sharding=each.sharding,
                weight=each.weight if isinstance(each, WeightedTeacherRecipe) else 1.0,
            )
            for each in self.recipe.all_teachers.values()
        ]

    def _new_segmenter(self, student: GKDStudentModel, stage: TaskRecipe) -> GKDStudentForSemanticSegmentation:
        classes = self.data.label_space.classes
        return GKDStudentForSemanticSegmentation.from_student(
            student,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            decode_head=stage.decode_head,
            norm_feature_maps=stage.norm_feature_maps,
        )

    def _stage_arguments(self, name: str, stage: StageRecipe) -> GKDDistillationArguments | GKDSegmentationArguments:
        steps, processes = train_steps(self.data, name, stage), self.state.num_processes
        return stage_arguments(self.recipe, name, stage, self.folders[name].path, steps, processes)

    # -- results ------------------------------------------------------------------------------------------------------

    def _report(self, trainer: GKDSegmentationTrainer, last: StageFolder | None) -> DomainReport:
        recipe = self.recipe
        trainers = {None: trainer} | {name: self._learn_task(name, None) for name in recipe.baselines}
        # Nothing was distilled into a student that label-free methods were given no stage for.
        frozen = last is None and recipe.method in LABEL_FREE_METHODS
        method = "frozen" if frozen else recipe.method
        report = DomainReport(self.data.source, self.data.label_space, recipe.as_dict(), recipe.seed, method=method)
        for baseline, each in trainers.items():
            results: dict[str, DomainResult] = each.evaluate_domains()
            for result in results.values():
                report.add(result, baseline)
        for folder in self.folders.values():
            report.add_skipped_rows(folder.summary()["skipped_rows"])
        return report

    def _finish_without_task(self, last: StageFolder) -> dict[str, Any]:
        place = self.output_dir / "encoder"
        if self.state.is_main_process:
            *_, stage = (stage for _, stage in self.recipe.stages)
            write_encoder(place, GKDStudentModel.from_pretrained(last.model), self.facts, stage.image_size)
            self._write_cards()
            print(f"\nThe distilled encoder is in {place}; add stages.task to teach it a task.", flush=True)
        wait_patiently()
        self._push()
        return {"encoder": str(place)}

    def _forget_result(self) -> None:
        """Remove what says that there is a result: until the new one is whole, the old must not pass for it."""
        for name in (FACTS_NAME, "report.json"):
            (self.output_dir / name).unlink(missing_ok=True)

    def _write_cards(self) -> None:
        names = [name for name, _ in self.recipe.stages.distillation()]
        for name in [*names, *(self._task_trainings() if self.recipe.stages.task is not None else [])]:
            facts = self.folders[name].summary().get("facts")
            if facts is not None:
                self.facts.stages[name] = StageFacts(**facts)
        self.facts.save(self.output_dir)
        write_cards(self.output_dir, self.recipe.hub.repo_id)

    def _closing_words(self) -> str:
        seconds = sum(stage.seconds for stage in self.facts.stages.values())
        return (
            f"report.md, report.png, encoder/ and segmenter/ are in {self.output_dir}; the stages took "
            f"{duration(seconds)} since they were last started"
        )

    def _push(self) -> None:
        """Push from the main process, after everything is saved and told; the others have nothing to wait for."""
        if self.recipe.hub.repo_id is not None and self.state.is_main_process:
            for url in push_run(self.output_dir):
                print(f"pushed: {url}", flush=True)

    def _finished_before(self) -> dict[str, Any] | None:
        """Tell the result of a run that is finished, and push it if that is wanted; None if there is more to do."""
        if not all(folder.finished for folder in self.folders.values()):
            return None
        result: dict[str, Any] = {"encoder": str(self.output_dir / "encoder")}
        table = f"The distilled encoder is in {result['encoder']}."
        try:
            check_finished(self.output_dir, self.recipe.as_dict())
            if not same_settings({"settings": RunFacts.load(self.output_dir).settings}, self.recipe):
                return None
            if self.recipe.stages.task is not None:
                result = json.loads((self.output_dir / "report.json").read_text(encoding="utf-8"))
                if not same_settings(result, self.recipe):
                    return None
                table = report_table(result)
        except (InputError, ValueError, OSError):
            return None
        # Every process has to have seen this before the main one writes.
        wait_patiently()
        if self.state.is_main_process:
            print(f"{self.output_dir} was finished before; remove its report.json to measure again", flush=True)
            self.recipe.save(self.output_dir)
            print(f"\n{table}", flush=True)
        self._push()
        return result


def new_student(recipe: Recipe) -> GKDStudentModel:
    """The student as the recipe names it, before any stage."""
    student = recipe.student
    return GKDStudentModel.from_encoder(
        student.encoder,
        pretrained=student.pretrained,
        revision=student.revision,
        freeze_batch_norm=student.freeze_batch_norm,
    )
