"""The heads that a distillation trains: new ones as its arguments say, or a check of those it goes on with."""

from __future__ import annotations

from collections.abc import Sequence

from gkd_hf.distillation.multi_teacher import MultiTeacherObjective
from gkd_hf.distillation.objective import OBJECTIVES, MSEObjective
from gkd_hf.errors import InputError
from gkd_hf.models.modeling_gkd import GKDStudentModel
from gkd_hf.teacher import GKDTeacher, short_names
from gkd_hf.training.arguments import GKDDistillationArguments


def new_objective(
    student: GKDStudentModel, teachers: Sequence[GKDTeacher], args: GKDDistillationArguments
) -> MSEObjective | MultiTeacherObjective:
    """Make the heads of a student and its teachers: of one that is taken as it is, the objective itself."""
    weights = (args.token_weight, args.feature_weight, args.patch_weight)

    def make(teacher: GKDTeacher) -> MSEObjective:
        own = {"attention_scale": args.attention_scale} if args.objective == "qsd" else {}
        return OBJECTIVES[args.objective](student.adapter.width, teacher.width, weights, **own)

    return joined_objective(
        [make(teacher) for teacher in teachers],
        [teacher.called for teacher in teachers],
        [teacher.weight for teacher in teachers],
        [teacher.standardise for teacher in teachers],
    )


def joined_objective(
    objectives: Sequence[MSEObjective],
    called: Sequence[str],
    weights: Sequence[float],
    standardise: Sequence[bool | None],
) -> MSEObjective | MultiTeacherObjective:
    """Put the objectives of all teachers into one; that of a single teacher that is taken as it is stays itself.

    Args:
        objectives, called, weights: of each teacher. standardise: None for those of which nobody has said so.
    """
    standardised = _standardised(standardise)
    if len(objectives) == 1 and not standardised[0] and weights[0] == 1:
        return objectives[0]
    names = short_names(called) if len(objectives) > 1 else [""]
    return MultiTeacherObjective(objectives, names, weights, standardised)


def check_objective(
    objective: MSEObjective | MultiTeacherObjective, student: GKDStudentModel, teachers: Sequence[GKDTeacher]
) -> None:
    """Raise `InputError` if heads are not of this student and these teachers."""
    multiple = isinstance(objective, MultiTeacherObjective)
    objectives = list(objective.objectives) if multiple else [objective]
    if len(objectives) != len(teachers):
        raise InputError(f"the heads are of {len(objectives)} teacher(s), {len(teachers)} are given")
    for each, teacher in zip(objectives, teachers, strict=True):
        projection = each.patch.value.proj
        wanted = (student.adapter.width, teacher.width)
        if (projection.in_features, projection.out_features) != wanted:
            raise InputError(
                f"the heads map {projection.in_features} to {projection.out_features} channels, student and teacher "
                f"need {wanted[0]} to {wanted[1]}"
            )
    standardised = tuple(str(k) in objective.standardise if multiple else False for k in range(len(teachers)))
    weights = objective.weights if multiple else (1.0,)
    asked = (
        _standardised([teacher.standardise for teacher in teachers]),
        tuple(teacher.weight for teacher in teachers),
    )
    if (standardised, weights) != asked:
        raise InputError(
            f"the heads go with standardised tokens {standardised} and weights {weights}, the teachers say {asked[0]} "
            f"and {asked[1]}: give the teachers what the heads were trained with"
        )


def _standardised(wanted: Sequence[bool | None]) -> tuple[bool, ...]:
    """Whose tokens are standardised: by default those of several teachers, and not the only one's, as in the paper."""
    return tuple(len(wanted) > 1 if each is None else each for each in wanted)
