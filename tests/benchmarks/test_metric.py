"""What the metric's benchmark compares is the same thing; its figures are nobody's to test."""

import numpy as np
import pytest
import torch

from gkd_hf.benchmarks import metric
from gkd_hf.errors import InputError
from gkd_hf.evaluation.mean_iou import confusion_counts


def test_histograms_find_what_is_counted_by_hand():
    truth, prediction = np.array([[0, 0, 0], [1, 2, 255]]), np.array([[0, 0, 1], [1, 1, 3]])
    intersection, union = metric.counted_by_histograms(prediction, truth, 4)
    assert intersection.tolist() == [2, 1, 0, 0] and union.tolist() == [3, 3, 1, 0]


@pytest.mark.parametrize("num_labels", [1, 2, 19, 150])
def test_intersections_and_unions_are_those_of_the_histograms(num_labels):
    prediction, truth = metric.label_pair(90, 130, num_labels, seed=num_labels)
    intersection, union = metric.counted_by_histograms(prediction.numpy(), truth.numpy(), num_labels)
    confusion = confusion_counts(prediction, truth, num_labels)
    hits = confusion.diagonal()
    assert hits.tolist() == intersection.tolist() and 0 < hits.sum() < truth.numel()
    assert (confusion.sum(0) + confusion.sum(1) - hits).tolist() == union.tolist()


def test_metric_is_measured_with_its_result():
    found = metric.measure_metric(40, 70, 5, rounds=1)
    assert found["equal"] and found["ours_ms"] > 0 and found["speedup"] > 0
    with pytest.raises(InputError, match="a pair of 0×4 pixels"):
        metric.measure_metric(0, 4)
    with pytest.raises(InputError, match="classes is 256: give at most 255"):
        metric.measure_metric(4, 4, 256)


def test_an_evaluation_is_measured_on_the_windows_that_it_forwards(monkeypatch):
    tiny = {"model_type": "resnet", "embedding_size": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}
    monkeypatch.setitem(metric.STUDENTS, "tiny", tiny | {"layer_type": "basic"})
    evaluated, forwarded, evaluate_domains = [], [], metric.GKDSegmentationTrainer.evaluate_domains

    def evaluate(trainer, sets, examples):
        evaluated.append(list(sets["toy_city"]))
        (result,) = evaluate_domains(trainer, sets, examples=examples).values()
        assert result.images == 2 and result.confusion.sum() == 2 * 1024 * 2048  # counted at the label's size

    monkeypatch.setattr(metric.GKDSegmentationTrainer, "evaluate_domains", evaluate)
    forward = metric._forward
    monkeypatch.setattr(metric, "_forward", lambda *given: forwarded.append(given[2]) or forward(*given))
    found = metric.measure_evaluation(metric.EvaluationSettings("tiny", images=4, rounds=2, workers=0))
    ids = [sample["id"] for samples in evaluated for sample in samples]
    assert len(ids) == len(set(ids)) == 4 and len(evaluated) == 2  # each round has images of its own
    for samples in evaluated:
        assert {sample["labels"].shape for sample in samples} == {torch.Size([1024, 2048])}
        assert {sample["pixel_values"].shape for sample in samples} == {torch.Size([3, 512, 1024])}
    _, *rounds = forwarded  # the first sets up
    for samples, windows in zip(evaluated, rounds, strict=True):
        crops = [sample["pixel_values"][:, :, left : left + 512] for sample in samples for left in (0, 341, 512)]
        assert [len(batch) for batch in windows] == [4, 2] and torch.equal(torch.cat(windows), torch.stack(crops))
    assert found["evaluation_over_forward"] > 0 and found["images_per_s"] == pytest.approx(4 / found["evaluation_s"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "vgg"}, "student is 'vgg': choose from resnet-18"),
        ({"images": 10, "rounds": 3}, "10 images in 3 rounds"),
        ({"classes": 2}, "2 classes"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        metric.EvaluationSettings(**changes)
