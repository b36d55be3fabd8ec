"""The metric against numbers worked by hand, and against a per-class loop that shares no code with it."""

import math
import socket

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from gkd_hf.errors import InputError
from gkd_hf.evaluation import mean_iou
from gkd_hf.evaluation.mean_iou import MeanIoU, confusion_counts, scores

# Truth and prediction of six pixels, one ignored:
#   class 0: 2 hits, truth 3, predicted 2 → IoU 2/3, accuracy 2/3
#   class 1: 1 hit,  truth 1, predicted 3 → IoU 1/3, accuracy 1
#   class 2: 0 hits, truth 1, predicted 0 → IoU 0,   accuracy 0
#   class 3: does not occur               → nan
TRUTH = torch.tensor([[0, 0, 0], [1, 2, 255]])
PREDICTION = torch.tensor([[0, 0, 1], [1, 1, 3]])


def loop_over_classes(predictions, references, num_labels):
    """Mean and per-class IoU the slow way: sets of pixels of the whole data set, class by class."""
    per_class = []
    for label in range(num_labels):
        intersection = union = 0
        for prediction, reference in zip(predictions, references, strict=True):
            for p, r in zip(prediction.ravel().tolist(), reference.ravel().tolist(), strict=True):
                if r != 255:
                    intersection += p == label and r == label
                    union += p == label or r == label
        per_class.append(intersection / union if union else math.nan)
    known = [value for value in per_class if not math.isnan(value)]
    return sum(known) / len(known), per_class


def test_figures_worked_by_hand():
    metric = MeanIoU(num_labels=4)
    metric.add_batch(predictions=PREDICTION[None], references=TRUTH[None])
    assert metric.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    figures = metric.compute()
    assert figures["per_class_iou"] == pytest.approx([2 / 3, 1 / 3, 0, math.nan], nan_ok=True)
    assert figures["mean_iou"] == pytest.approx(1 / 3)  # not 1/4: the class that does not occur has no say
    assert figures["mean_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert figures["overall_accuracy"] == pytest.approx(3 / 5)


def test_agrees_with_a_loop_over_classes_on_maps_of_several_sizes():
    rng = np.random.default_rng(0)
    sizes = [(9, 13), (4, 4), (1, 20)]
    references = [rng.choice([0, 1, 2, 4, 5, 255], size) for size in sizes]  # class 3 only ever predicted
    predictions = [rng.integers(0, 6, size) for size in sizes]
    metric = MeanIoU(num_labels=7)  # class 6 never occurs
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    metric.add(prediction=predictions[2], reference=references[2].astype(np.uint8))
    expected_mean, expected = loop_over_classes(predictions, references, 7)
    figures = metric.compute()
    assert figures["mean_iou"] == pytest.approx(expected_mean, rel=1e-12)
    assert figures["per_class_iou"] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert expected[3] == 0 and math.isnan(expected[6])


def test_sums_over_the_data_set_before_dividing():
    # One image all right on one pixel of class 1, another with 1 of 9 right: 2/10, not the mean (1 + 1/9) / 2.
    metric = MeanIoU(num_labels=2)
    metric.add_batch(predictions=[[[1]]], references=[[[1]]])
    metric.add_batch(predictions=[[[1] + [0] * 8]], references=[[[1] * 9]])
    assert metric.compute()["per_class_iou"][1] == pytest.approx(2 / 10)


def test_merging_processes_equals_one_process():
    one, first, second = MeanIoU(num_labels=4), MeanIoU(num_labels=4), MeanIoU(num_labels=4)
    one.add_batch(predictions=torch.stack([PREDICTION, TRUTH % 255]), references=torch.stack([TRUTH, TRUTH]))
    first.add_batch(predictions=PREDICTION[None], references=TRUTH[None])
    second.add_batch(predictions=TRUTH[None] % 255, references=TRUTH[None])
    first.merge(second.confusion)
    assert torch.equal(first.confusion, one.confusion) and len(one) == 10
    with pytest.raises(InputError, match=r"shape \(3, 3\).*4 classes"):
        first.merge(torch.zeros(3, 3))


def test_compute_ends_a_collection_but_keeps_the_count_readable():
    metric = MeanIoU(num_labels=4)
    for _ in range(2):
        metric.compute(predictions=PREDICTION[None], references=TRUTH[None])
        assert len(metric) == 5
    metric.merge(metric.confusion.clone())
    assert len(metric) == 5


def test_nothing_counted_is_nan_and_not_zero():
    figures = scores(torch.zeros(2, 2, dtype=torch.int64))
    assert all(map(math.isnan, [figures["mean_iou"], figures["overall_accuracy"], *figures["per_class_iou"]]))


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([[0, 255]], [[0, 1]], r"prediction holds the values 255, but the 4 classes are 0\.\.3;"),
        ([[0, 255]], [[0, 255]], "prediction holds the values 255"),
        ([[0, 1]], [[0, -100]], r"reference holds the values -100, but the 4 classes are 0\.\.3 or 255"),
        ([[0, 1, 1]], [[7, 4, 255]], "reference holds the values 4, 7,"),
        ([[0] * 12], [list(range(4, 16))], "values 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, …,"),
        ([[0, 1, 2]], [[0, 1]], r"shape \(1, 3\) and reference of shape \(1, 2\)"),
        ([[0.2, 0.8]], [[0, 1]], "prediction has type torch.float64; give class indices"),
    ],
)
def test_values_outside_the_classes_are_named(prediction, reference, message):
    with pytest.raises(InputError, match=message):
        MeanIoU(num_labels=4).add(prediction=prediction, reference=reference)


def test_batches_of_different_lengths_and_no_classes_are_refused():
    with pytest.raises(InputError, match="2 predictions came with 1 references"):
        MeanIoU(num_labels=4).add_batch(predictions=[[[0]], [[0]]], references=[[[0]]])
    with pytest.raises(InputError, match="num_labels is 0"):
        MeanIoU(num_labels=0)


def test_another_ignore_index():
    counts = confusion_counts(torch.tensor([0, 1, 1]), torch.tensor([0, -100, 1]), 2, ignore_index=-100)
    assert counts.tolist() == [[1, 0], [0, 1]] and counts.dtype == torch.int64


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("ignore_index", [255, 7, 3, -1, -100])
def test_all_types_and_sizes_agree_with_what_stays_on_a_gpu(kind, ignore_index, monkeypatch):
    monkeypatch.setattr(mean_iou, "_PIECE", 100)  # several pieces and threads, the last one shorter
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(7, (37, 23), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = ignore_index
    prediction = torch.randint(7, truth.shape, generator=generator).to(kind)
    truth = truth if ignore_index < 0 else truth.to(kind if ignore_index < 100 or kind != torch.int16 else torch.uint8)
    counts = confusion_counts(prediction, truth, 7, ignore_index)
    assert torch.equal(counts, mean_iou._counts_on_device(prediction.flatten(), truth.flatten(), 7, ignore_index))
    assert counts.sum() == (truth != ignore_index).sum() and counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("prediction", "truth"), [([0, 4], [0, 255]), ([0, -1], [0, 255]), ([0, 1], [4, 1]), ([0, 1], [-1, 1])]
)
def test_what_lies_outside_is_seen_on_a_gpu_too(prediction, truth):
    assert mean_iou._counts_on_device(torch.tensor(prediction), torch.tensor(truth), 4, 255) is None
    with pytest.raises(InputError, match=r"the 4 classes are 0\.\.3"):
        confusion_counts(torch.tensor(prediction), torch.tensor(truth), 4)


def test_no_pixels_and_an_impossible_ignore_index():
    assert confusion_counts(torch.zeros(0, 3, dtype=torch.uint8), torch.zeros(0, 3).long(), 2).tolist() == [
        [0, 0],
        [0, 0],
    ]
    with pytest.raises(InputError, match="ignore_index is 2147483648"):
        confusion_counts(PREDICTION, TRUTH, 4, ignore_index=2**31)


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (torch.tensor([1.0, 0.0]), torch.tensor([1, 0]), "prediction has type torch.float32; give class indices"),
        (torch.tensor([True, False]), torch.tensor([1, 0]), "prediction has type torch.bool"),
        (torch.tensor([1, 0]), torch.tensor([1.0, 0.0]), "reference has type torch.float32"),
        (torch.tensor([1, 0]), torch.tensor([True, False]), "reference has type torch.bool"),
    ],
)
def test_what_is_no_class_index_is_refused(prediction, reference, message):
    with pytest.raises(InputError, match=message):
        confusion_counts(prediction, reference, 2)


@pytest.mark.parametrize("ignore_index", [65535, -65536, 1024, -1024, 1023])
def test_an_ignore_index_far_from_the_classes(ignore_index, monkeypatch):
    rows = []
    pairs = mean_iou._pairs
    monkeypatch.setattr(mean_iou, "_pairs", lambda *given: rows.append(given[3]) or pairs(*given))
    truth = torch.where(TRUTH == 255, ignore_index, TRUTH)
    assert (
        confusion_counts(PREDICTION, truth, 4, ignore_index).tolist()
        == confusion_counts(PREDICTION, TRUTH, 4).tolist()
    )
    assert max(rows) <= 1024  # no table of a row for each value up to the ignored one
    with pytest.raises(
        InputError, match=f"reference holds the values 255, but the 4 classes are 0..3 or {ignore_index}"
    ):
        confusion_counts(PREDICTION, TRUTH, 4, ignore_index)


def test_writes_no_file(tmp_path):
    metric = MeanIoU(num_labels=4, cache_dir=str(tmp_path / "cache"))
    metric.compute(predictions=PREDICTION[None], references=TRUTH[None])
    assert list(tmp_path.iterdir()) == []


def test_loads_by_path_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the metric went to the network"))
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path))
    metric = evaluate.load(mean_iou.__file__, num_labels=4, cache_dir=str(tmp_path))
    figures = metric.compute(predictions=PREDICTION[None], references=TRUTH[None])
    assert figures["mean_iou"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("classes", [127, 128, 200, 1000])
def test_as_many_classes_as_narrow_numbers_do_not_hold(classes):
    """127 · 256 pairs are the most that 16 bits hold."""
    generator = torch.Generator().manual_seed(0)
    prediction, truth = torch.randint(0, classes, (2, 300, 301), generator=generator)
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    expected.index_put_((truth.flatten(), prediction.flatten()), torch.tensor(1), accumulate=True)
    assert torch.equal(confusion_counts(prediction, truth, classes, ignore_index=-1), expected)
    ignored = expected.clone()
    if classes > 255:
        ignored[255] = 0
    assert torch.equal(confusion_counts(prediction, truth, classes), ignored)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda metric: metric.add(prediction=[[1]]), "The reference is missing"),
        (lambda metric: metric.add_batch(predictions=[[[1]]]), "The references are missing"),
        (lambda metric: metric.add(prediction=[[1], [1, 0]], reference=[[1]]), r"prediction is no array .*\(list\)"),
        (lambda metric: metric.merge("counts"), r"The confusion count is no array of numbers \(str\)"),
        (lambda metric: MeanIoU(3.0), "num_labels is 3.0"),
        (lambda metric: MeanIoU("3"), "num_labels is '3'"),
        (lambda metric: MeanIoU(3, ignore_index=None), "ignore_index is None"),
        (lambda metric: MeanIoU(3, ignore_index=99999), "ignore_index is 99999"),
    ],
)
def test_what_is_no_label_map_is_told(call, message):
    with pytest.raises(InputError, match=message):
        call(MeanIoU(num_labels=2))


def test_what_numpy_reads_is_counted(recwarn):
    """Also a picture, whose memory may only be read, which torch would warn of."""
    truth = np.array([[0, 1], [1, 255]], np.uint8)
    for prediction in ([[0, 1], [0, 1]], Image.fromarray(np.array([[0, 1], [0, 1]], np.uint8))):
        assert confusion_counts(prediction, Image.fromarray(truth), 2).tolist() == [[1, 0], [1, 1]]
    metric = MeanIoU(np.int64(2), ignore_index=np.uint8(255))
    metric.add(prediction=prediction, reference=truth)
    assert metric.confusion.tolist() == [[1, 0], [1, 1]]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("prediction", "truth", "classes", "message"),
    [
        ([0, 1, 1], [0, 1, -1], 2, "reference holds the values -1,"),
        ([0, 1, -107], [0, 1, 1], 150, "prediction holds the values -107,"),
        ([0, 1, 1], [0, 1, -107], 150, "reference holds the values -107,"),
    ],
)
def test_a_negative_byte_is_no_class_and_not_the_ignored_one(prediction, truth, classes, message):
    """Which it is where it is read as 256 more."""
    with pytest.raises(InputError, match=message):
        confusion_counts(*(torch.tensor(each, dtype=torch.int8) for each in (prediction, truth)), classes)
    assert confusion_counts(*(torch.tensor([0, 1, 127], dtype=torch.int8),) * 2, 150).sum() == 3
