"""Mean intersection over union as an `evaluate` metric that keeps a class-by-class count and nothing else.

The predictions of a street-scene test set do not fit in memory or in an Arrow cache; C×C integers always do, and
they add up over batches, processes and images to exactly the intersections and unions of the whole data set.
"""

from __future__ import annotations

# evaluate's import scanner, which reads this file when it is loaded by path, understands one import per line only.
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from gkd_hf.errors import InputError

IGNORE_INDEX = 255

_DESCRIPTION = (
    "Intersection over union of each class, summed over the whole data set before dividing, "
    "and its mean over the classes whose union is not empty."
)
_INPUTS = """
Args:
    predictions: predicted class of every pixel, integers 0..num_labels-1, B×H×W or a list of H×W maps of any sizes.
    references: true class of every pixel, the same shapes; `ignore_index` (255) marks pixels that do not count.
Returns:
    mean_iou, mean_accuracy, overall_accuracy: fractions in 0..1, nan if there is nothing to average.
    per_class_iou: list of num_labels fractions, nan for a class that neither the truth nor the prediction contains.
"""
_CITATION = """
@article{everingham2010pascal,
  title = {The Pascal Visual Object Classes (VOC) Challenge},
  author = {Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and Zisserman, Andrew},
  journal = {International Journal of Computer Vision}, year = {2010}, volume = {88}, pages = {303--338}
}
"""


def confusion_counts(
    prediction: torch.Tensor, reference: torch.Tensor, num_labels: int, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Count how often each true class was predicted as each class.

    Args:
        prediction: integer tensor of any shape, values 0..num_labels-1.
        reference: integer tensor of the same shape, values 0..num_labels-1 or `ignore_index` (not counted).

    Returns:
        int64 tensor of shape num_labels×num_labels on `prediction`'s device: rows are truth, columns prediction.

    Raises:
        InputError: the shapes differ, or a value lies outside the classes (the message names the values). An ignored
            pixel is no excuse for a prediction outside the classes: no segmenter can produce one.
    """
    if prediction.shape != reference.shape:
        raise InputError(
            f"Prediction of shape {tuple(prediction.shape)} and reference of shape {tuple(reference.shape)} differ; "
            "resize the prediction to the label's size first."
        )
    prediction = prediction.long().flatten()
    reference = reference.to(prediction.device).long().flatten()
    counted = reference != ignore_index
    _require_classes(prediction, num_labels, "prediction", "")
    _require_classes(reference[counted], num_labels, "reference", f" or {ignore_index} (ignored)")
    pairs = reference[counted] * num_labels + prediction[counted]
    return torch.bincount(pairs, minlength=num_labels * num_labels).reshape(num_labels, num_labels)


def _require_classes(values: torch.Tensor, num_labels: int, what: str, also: str) -> None:
    outside = values[(values < 0) | (values >= num_labels)]
    if outside.numel() == 0:
        return
    unknown = outside.unique().tolist()
    shown = ", ".join(map(str, unknown[:10])) + (", …" if len(unknown) > 10 else "")
    raise InputError(
        f"The {what} holds the values {shown}, but the {num_labels} classes are 0..{num_labels - 1}{also}; "
        "check the label map and the number of labels."
    )


def scores(confusion: torch.Tensor) -> dict[str, Any]:
    """Turn a C×C count (rows = truth) into the figures of `MeanIoU`: IoU_c = n_cc / (Σ_j n_cj + Σ_i n_ic − n_cc)."""
    count = confusion.double().cpu()
    hits, truth = count.diagonal(), count.sum(1)
    # 0/0 is nan, which is the meaning wanted: the class does not occur, so it has no IoU and no say in the mean.
    per_class = hits / (truth + count.sum(0) - hits)
    return {
        "mean_iou": per_class.nanmean().item(),
        "per_class_iou": per_class.tolist(),
        "mean_accuracy": (hits / truth).nanmean().item(),
        "overall_accuracy": (hits.sum() / count.sum()).item(),
    }


class MeanIoU(evaluate.Metric):
    """Mean IoU over everything added so far; needs no network and writes no file.

    As with every metric of `evaluate`, `compute` ends a collection: the next `add_batch` or `merge` starts a new one.
    Until then `confusion` stays readable. In a distributed run each process counts its own images; sum the
    `confusion` of all processes and `merge` the others' into one.

    Args:
        num_labels: number of classes C.
        ignore_index: the reference value that marks pixels not to be counted.

    Raises:
        InputError: `num_labels` is not positive; an added value lies outside the classes (see `confusion_counts`).
    """

    def __init__(self, num_labels: int, ignore_index: int = IGNORE_INDEX, **evaluate_options: Any) -> None:
        if num_labels < 1:
            raise InputError(f"num_labels is {num_labels}; a segmentation metric needs at least one class.")
        super().__init__(**evaluate_options)
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self._start()

    def _start(self) -> None:
        self.confusion = torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64)
        self._computed = False

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def _build_data_dir(self) -> str:
        # The parent creates a cache folder here for the predictions; none are kept, and home may be read-only.
        return self._data_dir_root

    def __len__(self) -> int:
        """Number of pixels counted."""
        return int(self.confusion.sum())

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Count one H×W prediction against its reference."""
        if self._computed:
            self._start()
        counts = confusion_counts(
            _integers(prediction, "prediction"), _integers(reference, "reference"), self.num_labels, self.ignore_index
        )
        # Added on the counts' device first: moving C×C integers is nothing, moving label maps would be.
        self.confusion += counts.to(self.confusion.device)

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Count a batch: two B×H×W arrays or tensors, or two lists of H×W maps of any sizes."""
        if len(predictions) != len(references):
            raise InputError(f"A batch of {len(predictions)} predictions came with {len(references)} references.")
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def merge(self, confusion: torch.Tensor) -> None:
        """Add the C×C count of another process or another run."""
        if confusion.shape != self.confusion.shape:
            raise InputError(
                f"A confusion count of shape {tuple(confusion.shape)} cannot be merged into one of "
                f"{self.num_labels} classes."
            )
        if self._computed:
            self._start()
        self.confusion += confusion.to(self.confusion)

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any]:
        """Return the figures of everything added (and of the batch given here, if one is)."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        self._computed = True
        return scores(self.confusion)

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        # `evaluate` wants this method; it would be given stored predictions, and add_batch stores none.
        return scores(self.confusion)


def _integers(labels: Any, what: str) -> torch.Tensor:
    labels = labels if isinstance(labels, torch.Tensor) else torch.from_numpy(np.asarray(labels))
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"The {what} has type {labels.dtype}; give class indices (the argmax), not scores or masks.")
    return labels
