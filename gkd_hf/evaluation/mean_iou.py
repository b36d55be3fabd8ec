"""Mean intersection over union as an `evaluate` metric that keeps a class-by-class count and nothing else.

The predictions of a street-scene test set do not fit in memory or in an Arrow cache; C×C integers always do, and
they add up over batches, processes and images to exactly the intersections and unions of the whole data set.
"""

from __future__ import annotations

# evaluate's import scanner, which reads this file when it is loaded by path, understands one import per line only.
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike

from gkd_hf.errors import InputError

IGNORE_INDEX = 255
_NEAR = 1024
_PIECE = 32_768  # pixels counted at a time on a CPU: their pairs, 128 KiB, stay in a core's cache

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
    prediction: torch.Tensor | ArrayLike,
    reference: torch.Tensor | ArrayLike,
    num_labels: int,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """Count how often each true class was predicted as each class.

    On a CPU it is one pass, in pieces that stay in a core's cache. On a GPU everything stays there and the host waits
    for one number: how many values lie outside the classes.

    Args:
        prediction: integers of any shape, 0..num_labels-1: a tensor, or what numpy makes an array of.
        reference: the same, 0..num_labels-1 or `ignore_index` (not counted).
        ignore_index: within -65536..65535.

    Returns:
        int64 tensor of shape num_labels×num_labels on `prediction`'s device: rows are truth, columns prediction.

    Raises:
        InputError: one of the two is missing, of a floating type or boolean, or no numbers; the shapes differ; or a
            value lies outside the classes (the message names the values). An ignored pixel is no excuse for a
            prediction outside the classes: no segmenter can produce one.
    """
    prediction, reference = _tensor(prediction, "prediction"), _tensor(reference, "reference")
    for what, labels in (("prediction", prediction), ("reference", reference)):
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(
                f"The {what} has type {labels.dtype}; give class indices (the argmax), not scores or masks."
            )
    if prediction.shape != reference.shape:
        raise InputError(
            f"Prediction of shape {tuple(prediction.shape)} and reference of shape {tuple(reference.shape)} differ; "
            "resize the prediction to the label's size first."
        )
    ignore_index = _ignored(ignore_index)
    prediction, reference = prediction.flatten(), reference.to(prediction.device).flatten()
    # The host's way keeps a row for every value up to the ignored one, and all of them should stay in the cache.
    on_host = prediction.device.type == "cpu" and abs(ignore_index) < max(_NEAR, num_labels)
    counts = (_counts_on_host if on_host else _counts_on_device)(prediction, reference, num_labels, ignore_index)
    if counts is None:
        _require_classes(prediction.long(), num_labels, "prediction", "")
        counted = reference.long()
        counted = counted[counted != ignore_index]
        _require_classes(counted, num_labels, "reference", f" or {ignore_index} (ignored)")
    return counts


def _counts_on_host(
    prediction: torch.Tensor, reference: torch.Tensor, num_labels: int, ignore_index: int
) -> torch.Tensor | None:
    """Count pairs of values, ignored ones too; None if a value lies outside the classes.

    Every value between the classes and the ignored one gets a row, so that no mask is needed: what lies outside shows
    in the counts.
    """
    first, last = min(ignore_index, 0), max(ignore_index, num_labels - 1)
    rows = last - first + 1
    threads = max(1, min(torch.get_num_threads(), len(prediction) // _PIECE))
    share = -(-len(prediction) // threads)
    own, *others = zip(prediction.split(share), reference.split(share), strict=True)

    def count(part: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor | None:
        return _pairs(part[0].numpy(), part[1].numpy(), first, rows, num_labels)

    # numpy and torch let go of the interpreter while they count. One share is counted here: a thread less to wake.
    with ThreadPoolExecutor(threads) as pool:
        counting = pool.map(count, others)
        found = [count(own), *counting]
    if any(part is None for part in found):
        return None
    by_row = sum(found, torch.zeros(rows * num_labels, dtype=torch.int64)).reshape(rows, num_labels)
    by_row[ignore_index - first] = 0
    confusion = by_row[-first : num_labels - first]
    return confusion.clone() if confusion.sum() == by_row.sum() else None


def _pairs(prediction: np.ndarray, reference: np.ndarray, first: int, rows: int, columns: int) -> torch.Tensor | None:
    """Count pairs of a prediction 0..columns-1 and a reference first..first+rows-1, piece by piece.

    rows·columns counts; None if a value lies outside.
    """
    # As narrow as can be: more of them are computed at once, and the values, which fit by then, are cut off safely.
    kind = next(np.dtype(each) for each in (np.int16, np.int32, np.int64) if rows * columns <= np.iinfo(each).max)
    counts, (pairs, narrow) = torch.zeros(rows * columns, dtype=torch.int64), np.empty((2, _PIECE), kind)
    prediction, reference = _unsigned(prediction, columns), _unsigned(reference, rows) if first == 0 else reference
    for start in range(0, len(prediction), _PIECE):
        column, row = prediction[start : start + _PIECE], reference[start : start + _PIECE]
        if column.max() >= columns or row.max() >= first + rows or (first < 0 and row.min() < first):
            return None
        pairs, narrow = pairs[: len(row)], narrow[: len(row)]
        np.copyto(pairs, row, casting="unsafe")
        np.copyto(narrow, column, casting="unsafe")
        if first:
            pairs -= first
        pairs *= columns
        pairs += narrow
        counts += torch.bincount(torch.from_numpy(pairs), minlength=len(counts))
    return counts


def _unsigned(values: np.ndarray, count: int) -> np.ndarray:
    """Integers read as unsigned numbers, where negative ones are ``count`` or more: one comparison for both ends."""
    if values.dtype.kind == "i" and count > np.iinfo(values.dtype).max + 1:
        values = values.astype(np.int64)
    return values.view(f"u{values.dtype.itemsize}")


def _counts_on_device(
    prediction: torch.Tensor, reference: torch.Tensor, num_labels: int, ignore_index: int
) -> torch.Tensor | None:
    """Count pairs where the tensors are; None, the one thing the host waits for, if a value lies outside."""
    prediction, reference = prediction.long(), reference.long()
    ignored = reference == ignore_index
    outside = (reference < 0) | (reference >= num_labels)
    outside = (outside & ~ignored) | (prediction < 0) | (prediction >= num_labels)
    cells = num_labels * num_labels
    pairs = (reference * num_labels + prediction).masked_fill_(ignored, cells).masked_fill_(outside, cells + 1)
    # bincount would ask the device for the smallest and the largest value, and wait for both.
    counts = torch.zeros(cells + 2, dtype=torch.int64, device=pairs.device)
    counts.scatter_add_(0, pairs, torch.ones_like(counts[:1]).expand_as(pairs))
    return None if counts[-1].item() else counts[:cells].reshape(num_labels, num_labels)


def _tensor(labels: Any, what: str) -> torch.Tensor:
    if isinstance(labels, torch.Tensor):
        return labels
    if labels is None:
        raise InputError(f"The {what} is missing: give class indices, one for each pixel.")
    try:
        array = np.asarray(labels)
        # A picture of PIL's lends its memory for reading alone, which torch warns of.
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The {what} is no array of numbers ({type(labels).__name__}): give class indices."
        ) from error


def _ignored(ignore_index: int) -> int:
    if not isinstance(ignore_index, Integral) or not -65536 <= ignore_index <= 65535:
        raise InputError(f"ignore_index is {ignore_index!r}: give a label value within -65536..65535.")
    return int(ignore_index)  # a narrow number of numpy's would overflow in sums


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
    count = confusion.cpu().double()
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
    Until then `confusion` stays readable, on the device of the last predictions. In a distributed run each process
    counts its own images; sum the `confusion` of all processes and `merge` the others' into one.

    Args:
        num_labels: number of classes C.
        ignore_index: the reference value that marks pixels not to be counted.

    Raises:
        InputError: `num_labels` is no positive whole number, or `ignore_index` out of range; what is added is not as
            `confusion_counts` wants it.

    Example:
        >>> metric = MeanIoU(num_labels=2)
        >>> metric.add(prediction=[[0, 1], [1, 1]], reference=[[0, 1], [0, 255]])
        >>> metric.compute()["mean_iou"]
        0.5
    """

    def __init__(self, num_labels: int, ignore_index: int = IGNORE_INDEX, **evaluate_options: Any) -> None:
        if not isinstance(num_labels, Integral) or num_labels < 1:
            raise InputError(f"num_labels is {num_labels!r}; a segmentation metric needs at least one class.")
        super().__init__(**evaluate_options)
        self.num_labels = int(num_labels)
        self.ignore_index = _ignored(ignore_index)
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
        counts = confusion_counts(prediction, reference, self.num_labels, self.ignore_index)
        # Summed where the predictions are: of a pair on a GPU the host waits for one number alone, how many values
        # lie outside the classes.
        self.confusion = self.confusion.to(counts.device) + counts

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Count a batch: two B×H×W arrays or tensors, or two lists of H×W maps of any sizes."""
        if predictions is None or references is None:
            raise InputError(f"The {'predictions are' if predictions is None else 'references are'} missing.")
        if len(predictions) != len(references):
            raise InputError(f"A batch of {len(predictions)} predictions came with {len(references)} references.")
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def merge(self, confusion: torch.Tensor) -> None:
        """Add the C×C count of another process or another run."""
        confusion = _tensor(confusion, "confusion count")
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
