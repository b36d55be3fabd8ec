"""What a recipe's one-stage methods need beside the student: their losses, their teacher, and a head for that."""

from __future__ import annotations

from pathlib import Path

from gkd_hf.distillation.one_stage import ONE_STAGE, OneStageMethod, check_method
from gkd_hf.errors import InputError
from gkd_hf.models.encoders import common_grid
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.task_teacher import TaskTeacher
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.recipe import Recipe, TeacherRecipe
from gkd_hf.training.recipe_data import TOY_TEACHER

TEACHER_HEAD = "teacher_head"


def new_method(
    recipe: Recipe, name: str, student: GKDStudentModel, teacher: GKDTeacher, classes: int
) -> OneStageMethod:
    """Return the losses of a one-stage method with new projections, as the recipe has them."""
    return ONE_STAGE[name](student.adapter.width, teacher.width, classes, **recipe.method_settings(name))


def check_one_stage(recipe: Recipe, name: str, student: GKDStudentModel, teacher: GKDTeacher, image_size: int) -> None:
    """Refuse, before any training, what a one-stage method cannot do with these two encoders.

    Raises:
        InputError: a setting outside its range, a grid too small, encoders without the blocks that are compared, or
            images that the student would have to pad.
    """
    stride = student.adapter.stride
    if image_size % stride:
        best = max(1, round(image_size / stride)) * stride
        raise InputError(
            f"image_size {image_size} is no multiple of the student's stride {stride}, so that its tokens and those "
            f"of the teacher would not cover the same pixels; the nearest that is: {best}"
        )
    try:
        check_method(
            name,
            student.adapter,
            teacher.adapter,
            common_grid(student.adapter, teacher.adapter, image_size),
            **recipe.method_settings(name),
        )
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error


def new_teacher(recipe: Recipe, head: Path | None = None) -> TaskTeacher:
    """The recipe's teacher for a one-stage method; ``head``: where the segmenter is in which its head was learnt."""
    segmenter = None if head is None else GKDStudentForSemanticSegmentation.from_pretrained(head)
    return TaskTeacher(
        teacher_source(recipe.teacher), segmenter, geometry=recipe.teacher.geometry, revision=recipe.teacher.revision
    )


def teacher_source(teacher: TeacherRecipe) -> str:
    """Hub id or folder of a recipe's teacher."""
    return str(TOY_TEACHER) if teacher.name == "toy" else teacher.name


def teacher_as_student(recipe: Recipe, student: GKDStudentModel, image_size: int) -> tuple[GKDStudentModel, int]:
    """The teacher's encoder as a student whose head can be learnt, and the side of the images that it sees.

    It sees them as it will when it teaches: as large as its own geometry wants them for the common grid.
    """
    body = GKDStudentModel.from_encoder(teacher_source(recipe.teacher), revision=recipe.teacher.revision)
    with_geometry = new_teacher(recipe)
    grid = common_grid(student.adapter, with_geometry.adapter, image_size)
    if recipe.teacher.geometry == "native":
        return body, grid[0] * body.adapter.stride
    with_geometry.fit_geometry(image_size, grid)
    body.set_geometry(image_size, image_size // grid[0])
    return body, image_size
