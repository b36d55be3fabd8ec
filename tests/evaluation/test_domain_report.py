"""The report: figures worked by hand in all its forms, whole files only, and a picture that shows what it should."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gkd_hf.errors import InputError
from gkd_hf.evaluation.domain_report import DomainReport, DomainResult


@dataclass(frozen=True)
class Space:
    name: str = "tiny"
    classes: tuple[str, ...] = ("road", "sky", "car")
    palette: tuple[tuple[int, int, int], ...] = ((128, 64, 128), (70, 130, 180), (0, 0, 142))


def result(domain, right, wrong, **more):
    """Road has IoU right/(right+wrong), sky right/(right+wrong) too; car does not occur: the mean is the same."""
    confusion = torch.tensor([[right, wrong, 0], [0, right, 0], [0, 0, 0]])
    return DomainResult(domain, confusion, **{"images": 10, **more})


@pytest.fixture
def report():
    skipped = [{"domain": "fog", "id": "7", "reason": "cannot | identify\nimage"}]
    report = DomainReport("day", Space(), {"stages": {"task": {"rate": math.nan, "folder": Path("/x")}}}, seed=3)
    for domain, alone, ours in (("day", 80, 90), ("night", 20, 50), ("fog", 40, 60)):
        rows = skipped if domain == "fog" else []
        report.add(result(domain, alone, 100 - alone, skipped=rows), baseline="none")
        report.add(result(domain, ours, 100 - ours, skipped=rows))
    return report


def test_json_holds_the_figures_in_percent(report, tmp_path):
    report.write(tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "report.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["source"] == "day" and content["seed"] == 3
    assert list(content["targets"]) == ["night", "fog"]
    assert content["targets"]["night"] == {
        "miou": pytest.approx(50),
        "per_class": {"road": pytest.approx(50), "sky": pytest.approx(50), "car": None},
        "images": 10,
        "skipped": 0,
    }
    assert content["targets"]["fog"]["skipped"] == 1
    assert content["mean_target_miou"] == pytest.approx(55)  # the source's 90 stands apart
    assert content["source_result"]["miou"] == pytest.approx(90)
    assert content["baselines"]["none"]["mean_target_miou"] == pytest.approx(30)
    assert content["baselines"]["none"]["targets"]["fog"]["miou"] == pytest.approx(40)
    assert content["settings"] == {"stages": {"task": {"rate": None, "folder": "/x"}}}
    assert content["versions"]["torch"] == torch.__version__
    assert {"gkd_hf", "transformers", "accelerate", "datasets"} <= set(content["versions"])
    assert [row["id"] for row in content["skipped_rows"]] == ["7"]  # once, though both models met it


def test_terminal_table(report):
    assert report.table().splitlines()[-11:] == [
        "1 bad row skipped, listed in report.md",
        "┌──────────────────────────┬───────┬──────┬───────┐",
        "│ domain                   │ alone │  GKD │  gain │",
        "├──────────────────────────┼───────┼──────┼───────┤",
        "│ day (source)             │  80.0 │ 90.0 │ +10.0 │",
        "├──────────────────────────┼───────┼──────┼───────┤",
        "│ night                    │  20.0 │ 50.0 │ +30.0 │",
        "│ fog                      │  40.0 │ 60.0 │ +20.0 │",
        "├──────────────────────────┼───────┼──────┼───────┤",
        "│ mean of 2 unseen domains │  30.0 │ 55.0 │ +25.0 │",
        "└──────────────────────────┴───────┴──────┴───────┘",
    ]


def test_table_without_a_baseline_has_no_gain():
    report = DomainReport("day", Space(), {}, 0, method="mse")
    report.add(result("night", 1, 1))
    header, *_, mean, _ = report.table().splitlines()[2:]
    assert [cell.strip() for cell in header.strip("│").split("│")] == ["domain", "MSE"]
    assert [cell.strip() for cell in mean.strip("│").split("│")] == ["mean of 1 unseen domain", "50.0"]


def test_several_baselines_stand_in_order_and_the_gain_is_over_the_student_alone(report):
    report.add(result("night", 30, 70), baseline="kd")
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in report.table().splitlines()]
    assert ["domain", "alone", "KD", "GKD", "gain"] in lines
    assert ["night", "20.0", "30.0", "50.0", "+30.0"] in lines
    assert ["fog", "40.0", "–", "60.0", "+20.0"] in lines
    # kd lacks fog: a mean over night alone would not compare with the others'.
    assert ["mean of 2 unseen domains", "30.0", "–", "55.0", "+25.0"] in lines


def test_markdown_tells_domains_classes_rows_settings_and_versions(report):
    text = report.markdown()
    assert "| night | 20.0 | 50.0 | +30.0 | 10 |" in text
    assert "| **mean of 2 unseen domains** | **30.0** | **55.0** | **+25.0** |" in text
    assert "| class | day | night | fog |" in text
    assert "| road | 90.0 (+10.0) | 50.0 (+30.0) | 60.0 (+20.0) |" in text
    assert "| car | – | – | – |" in text
    assert r"| fog | 7 |  |  | cannot \| identify image |" in text
    assert "- 1 × cannot | identify image" in text
    assert "| stages.task.rate | null |" in text and '| stages.task.folder | "/x" |' in text
    assert f"| torch | {torch.__version__} |" in text and "| seed | 3 |" in text
    assert "report.png" in text and "## How to read this" in text


def test_rows_skipped_in_training_are_listed_too(report):
    rows = [{"domain": "day", "id": str(index), "reason": "truncated"} for index in range(60)]
    report.add_skipped_rows(rows)
    report.add_skipped_rows(rows[:5])
    assert len(report.as_dict()["skipped_rows"]) == 61
    assert "| day | 48 |  |  | truncated |" in report.markdown() and "and 11 more" in report.markdown()
    assert "- 60 × truncated" in report.markdown()


def test_several_sources_are_pooled_and_are_not_targets():
    report = DomainReport("gtav+synthia", Space(), {}, 0)
    report.add(result("gtav", 1, 3, images=2))
    report.add(result("synthia", 3, 1, images=5))
    report.add(result("city", 1, 9))
    content = report.as_dict()
    assert list(content["targets"]) == ["city"] and content["mean_target_miou"] == pytest.approx(10)
    assert content["source_result"]["miou"] == pytest.approx(50) and content["source_result"]["images"] == 7


def test_a_domain_in_which_nothing_was_counted_is_empty_and_not_zero():
    report = DomainReport("day", Space(), {}, 0)
    report.add(result("night", 0, 0, images=0))
    report.add(result("fog", 1, 1))
    content = report.as_dict()
    assert content["targets"]["night"]["miou"] is None and content["mean_target_miou"] == pytest.approx(50)
    assert "│ night                   │    – │" in report.table()


def test_refuses_another_label_space_and_a_domain_named_twice(report):
    with pytest.raises(InputError, match=r"'snow' counts \(2, 2\) classes.*'tiny' has 3"):
        report.add(DomainResult("snow", torch.zeros(2, 2), 1))
    with pytest.raises(InputError, match="'fog' is evaluated twice"):
        report.add(result("fog", 1, 1))


def test_a_failed_write_leaves_the_old_report_and_no_rest(report, tmp_path, monkeypatch):
    report.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["report.json", "report.md", "report.png"]

    def full(path, text, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    report.seed = 4
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(after) == sorted(before) and after["report.json"] == before["report.json"]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (360, 480), (700, 1500)])
def test_picture_shows_image_truth_and_predictions_in_the_classes_colours(tmp_path, height, width):
    image = np.full((height, width, 3), (10, 200, 30), np.uint8)
    truth = np.full((height, width), 255, np.uint8)
    truth[height // 2 :] = 0
    report = DomainReport("day", Space(), {}, 0)
    for domain in ("day", "night"):
        report.add(result(domain, 1, 1, examples=[(image, truth, np.full_like(truth, 1))]), baseline="none")
        report.add(result(domain, 1, 1, examples=[(image, truth, np.full_like(truth, 2))]))
    report.write(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "report.png").convert("RGB")).astype(int)
    quarters = np.array_split(picture, 4, axis=1)  # four columns of cells, near enough

    def share(part, colour):
        return (np.abs(part - colour).sum(-1) < 8).mean()

    sky, car, road = Space.palette[1], Space.palette[2], Space.palette[0]
    for column, colour in enumerate([(10, 200, 30), road, sky, car]):
        shares = [share(quarter, colour) for quarter in quarters]
        assert int(np.argmax(shares)) == column and shares[column] > 0.2
    assert share(quarters[1], (0, 0, 0)) > 0.2  # the ignored half of the truth
    ratio = height / width
    assert picture.shape[0] / picture.shape[1] == pytest.approx(2 * ratio / 4, abs=0.35)


def test_a_picture_for_others_has_rows_of_the_domains_that_may_be_shown(tmp_path):
    report, colours = DomainReport("day", Space(), {}, 0), {"day": (10, 200, 30), "night": (250, 10, 240)}
    for domain, colour in colours.items():
        image, labels = np.full((64, 64, 3), colour, np.uint8), np.zeros((64, 64), np.uint8)
        report.add(result(domain, 1, 1, examples=[(image, labels, labels)]))

    def shown(path):
        picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
        return {name for name, colour in colours.items() if (np.abs(picture - colour).sum(-1) < 8).mean() > 0.05}

    report.draw(tmp_path / "all.png")
    assert shown(tmp_path / "all.png") == {"day", "night"}
    report.draw(tmp_path / "some.png", shown=["night", "elsewhere"])
    assert shown(tmp_path / "some.png") == {"night"}
    with pytest.raises(InputError, match="nothing to draw"):
        report.draw(tmp_path / "none.png", shown=["elsewhere"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "some.png"]


def test_picture_without_examples_is_still_written(report, tmp_path):
    report.write(tmp_path)
    assert Image.open(tmp_path / "report.png").size[0] > 300


@pytest.mark.parametrize(
    ("method", "frozen", "title", "student"),
    [
        ("gkd", True, "GKD", "distilled before it learned the task (query-based soft distillation)."),
        ("gkd", False, "GKD", "(query-based soft distillation), then trained end to end with its head."),
        ("kd", True, "KD", "distilled while it learned the task, encoder and head together."),
        ("none", True, "alone", "trained end to end, not distilled."),
        ("frozen", True, "frozen", "as it was, its encoder frozen."),
        ("frozen", False, "undistilled", "trained end to end, not distilled."),
    ],
)
def test_the_explanation_follows_what_was_trained(method, frozen, title, student):
    settings = {"method": "gkd", "stages": {"task": {"freeze_encoder": frozen}}}
    report = DomainReport("day", Space(), settings, seed=3, method=method)
    report.add(result("night", 50, 50))
    text = report.markdown()
    assert text.startswith(f"# {title} from day") and f"- **{title}** is the student " in text
    assert f"{student}\n" in text
