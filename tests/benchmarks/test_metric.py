"""What the metric's benchmark compares is the same thing; its figures are nobody's to test."""

from functools import partial

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
    assert found["speedup_range"][0] <= found["speedup"] <= found["speedup_range"][1]
    with pytest.raises(InputError, match="a pair of 0×4 pixels"):
        metric.measure_metric(0, 4)
    with pytest.raises(InputError, match="classes is 256: give at most 255"):
        metric.measure_metric(4, 4, 256)


def test_an_evaluation_is_measured_on_the_windows_that_it_forwards(monkeypatch):
    tiny = {"model_type": "resnet", "embedding_size": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}
    monkeypatch.setitem(metric.STUDENTS, "tiny", tiny | {"layer_type": "basic"})
    evaluated, forwarded, evaluate_domains = [], [], metric.GKDSegmentationTrainer.evaluate_domains

    def evaluate(trainer, sets, examples):
        evaluated.append(sets["toy_city"])
        (result,) = evaluate_domains(trainer, sets, examples=examples).values()
        assert result.images == 3 and result.confusion.sum() == 3 * 1024 * 2048  # counted at the label's size

    monkeypatch.setattr(metric, "_HELD", 1)
    monkeypatch.setattr(
        metric, "GKDSegmentationArguments", partial(metric.GKDSegmentationArguments, per_device_eval_batch_size=2)
    )
    monkeypatch.setattr(metric.GKDSegmentationTrainer, "evaluate_domains", evaluate)
    forward = metric._forward
    monkeypatch.setattr(metric, "_forward", lambda *given: forwarded.append(given[2]) or forward(*given))
    found = metric.measure_evaluation(metric.EvaluationSettings("tiny", images=3, rounds=1, workers=0))
    (images,) = evaluated
    samples = list(images)
    assert len({sample["id"] for sample in samples}) == 3
    assert {sample["labels"].shape for sample in samples} == {torch.Size([1024, 2048])}
    assert {sample["pixel_values"].shape for sample in samples} == {torch.Size([3, 512, 1024])}
    pixels = [images.normalised(sample["pixel_values"]) for sample in samples]
    _, *parts = forwarded  # the first sets up; one part before the evaluation, one after it
    assert [[len(batch) for batch in part] for part in parts] == [[4, 2], [3]]
    crops = [image[:, :, left : left + 512] for image in pixels for left in (0, 341, 512)]
    assert torch.equal(torch.cat([batch for part in parts for batch in part]), torch.stack(crops))
    assert found["evaluation_over_forward"] > 0 and found["images_per_s"] == pytest.approx(3 / found["evaluation_s"])
    assert found["evaluation_over_forward"] == pytest.approx(found["evaluation_s"] / found["forward_s"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "vgg"}, "student is 'vgg': choose from resnet-18"),
        ({"images": 10, "rounds": 0}, "10 images in 0 rounds"),
        ({"classes": 2}, "classes is 2: give 8 or more"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        metric.EvaluationSettings(**changes)
