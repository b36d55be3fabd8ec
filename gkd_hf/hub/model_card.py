"""The model cards of a run: an object that the run fills, rendered from model_cards/TEMPLATE.md by the Hub's classes.

Numbers are report.json's own. What did not happen is said not to have happened: a recipe that was never run gets a
card without a single figure.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gkd_hf.data.domains import domain_names
from gkd_hf.data.shards import is_hub_id
from gkd_hf.evaluation.report_text import box_table, markdown_table, percent, signed, wrapped
from gkd_hf.hub.licences import (
    binding_terms,
    card_domain,
    data_place,
    data_terms,
    derived_licence,
    ingredients,
    is_rendered,
    may_be_shown,
    teacher_settings,
)
from gkd_hf.hub.onnx import onnx_usage
from gkd_hf.hub.repo_names import RepoNames
from gkd_hf.hub.run_facts import ArtefactFacts, RunFacts
from gkd_hf.hub.short_paths import shortened
from gkd_hf.methods import (
    FROZEN,
    METHODS,
    UNDISTILLED,
    compares_logits,
    encoder_learns_task,
    method_kind,
    method_title,
)

TEMPLATE = Path(__file__).parents[1] / "assets" / "model_card" / "TEMPLATE.md"
ARXIV = "2603.02554"
STAGES = {
    "task_agnostic": ("broad images, no labels", "the student, to give the teacher's tokens"),
    "domain_agnostic": ("the source domain's images, no labels", "the student, to give the teacher's tokens"),
    "task": ("the source domain's images and labels", "the decode head; the student is frozen"),
    "teacher_head": (
        "the source domain's images and labels",
        "a head on the frozen teacher, whose logits are compared",
    ),
}
END_TO_END = "student and head, end to end"
# The configuration classes say what they are; people use these names.
MODEL_TITLES = {
    "clip_vision_model": "CLIP vision tower",
    "convnext": "ConvNeXt",
    "convnextv2": "ConvNeXt V2",
    "deit": "DeiT",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "dinov3_convnext": "DINOv3 ConvNeXt",
    "dinov3_vit": "DINOv3",
    "efficientnet": "EfficientNet",
    "ijepa": "I-JEPA",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    "mobilevit": "MobileViT",
    "pvt_v2": "PVT v2",
    "radio": "RADIO",
    "resnet": "ResNet",
    "segformer": "SegFormer MiT",
    "siglip2_vision_model": "SigLIP 2 vision tower",
    "siglip_vision_model": "SigLIP vision tower",
    "swin": "Swin",
    "swinv2": "Swin V2",
    "timm_wrapper": "timm encoder",
    "vit": "ViT",
}


@dataclass
class GKDModelCard:
    """The card of a run's encoder or segmenter.

    Args:
        artefact: which of the two. facts: what the run told. names: how the two are loaded.
        report: the content of report.json; None: nothing was evaluated.
        files: what lies beside the card, as paths within the folder.
        license: the Hub's licence id; None: the recipe's, or derived.
    """

    artefact: Literal["encoder", "segmenter"]
    facts: RunFacts
    names: RepoNames
    report: Mapping[str, Any] | None = None
    files: frozenset[str] = field(default_factory=frozenset)
    license: str | None = None

    @property
    def name(self) -> str:
        """Name of this artefact: a Hub id or a folder."""
        return self.names.encoder if self.artefact == "encoder" else self.names.segmenter

    @property
    def title(self) -> str:
        """What the model is called."""
        if self.names.on_hub:
            return self.name.partition("/")[2]
        run = Path(self.name).parent.name
        return f"{run or 'gkd'}-{self.artefact}"

    def render(self) -> ModelCard:
        """Return the card; its metadata was parsed back from what was written."""
        card = ModelCard.from_template(self.metadata(), template_path=str(TEMPLATE), **self._values())
        # What a template leaves out leaves its empty lines behind, and lines that are as long as what was filled in.
        card.text = "\n" + wrapped(re.sub(r"\n{3,}", "\n\n", card.text).strip()) + "\n"
        return card

    def save(self, folder: str | os.PathLike) -> Path:
        """Write README.md into a folder."""
        path = Path(folder) / "README.md"
        self.render().save(path)
        return path

    # -- metadata -----------------------------------------------------------------------------------------------------

    def metadata(self) -> ModelCardData:
        """The card's YAML header."""
        settings = self.facts.settings
        page = f"https://huggingface.co/{self.name}" if self.names.on_hub else ""
        chosen = {"hub": {"license": self.license}} if self.license else {}
        licence = derived_licence({**settings, **chosen}, page)
        base = self._student_id
        segmenter = self.artefact == "segmenter"
        tags = ["gkd", "domain-generalization", "semantic-segmentation", f"arxiv:{ARXIV}"]
        if self._kind not in (FROZEN, "plain"):
            tags.insert(1, "knowledge-distillation")
        results = self._eval_results()
        extra: dict[str, Any] = {}
        if base is not None:
            extra["base_model_relation"] = "finetune"
        if segmenter and "example.png" in self.files:
            extra["widget"] = [{"src": "example.png", "example_title": "An image of a domain unseen in training"}]
        return ModelCardData(
            library_name="transformers",
            pipeline_tag="image-segmentation" if segmenter else "image-feature-extraction",
            license=licence.id,
            license_name=licence.name,
            license_link=licence.link,
            base_model=base,
            datasets=self._hub_datasets() or None,
            metrics=["mean_iou"] if self.report else None,
            tags=[*tags, "custom_code"] if self._facts_here and not self._facts_here.native else tags,
            model_name=self.title if results else None,
            eval_results=results or None,
            **extra,
        )

    @property
    def _facts_here(self) -> ArtefactFacts | None:
        return self.facts.encoder if self.artefact == "encoder" else self.facts.segmenter

    @property
    def _student_id(self) -> str | None:
        """Hub id of the weights the student began with."""
        student = self.facts.settings.get("student") or {}
        encoder = student.get("encoder")
        if isinstance(encoder, str) and student.get("pretrained") and is_hub_id(encoder):
            return encoder
        return None

    def _trained_domains(self) -> list[str]:
        stages = (self.facts.settings.get("stages") or {}).values()
        return list(dict.fromkeys(name for stage in stages if stage for name in domain_names(stage["data"])))

    def _hub_datasets(self) -> list[str]:
        places = [data_place(self.facts.settings, name) for name in self._trained_domains()]
        return list(dict.fromkeys(place for place in places if is_hub_id(place)))

    def _eval_results(self) -> list[EvalResult]:
        if not self.report:
            return []
        results = dict(self.report["targets"])
        if self.report["source_result"] is not None:
            results = {self.report["source"]: self.report["source_result"]} | results
        found = []
        for name, result in results.items():
            if result["miou"] is None:
                continue
            unseen = name in self.report["targets"]
            place = data_place(self.facts.settings, name)
            mixed = len(domain_names(name)) > 1
            found.append(
                EvalResult(
                    task_type="image-segmentation",
                    task_name="Semantic segmentation",
                    dataset_type=place if is_hub_id(place) else name,
                    # Domains that lie in one data set would else be taken for one, with two results.
                    dataset_config=name,
                    dataset_name=f"{name} ({'unseen in training' if unseen else 'source, held out'})",
                    dataset_split=None if mixed else card_domain(name).splits.get("test"),
                    metric_type="mean_iou",
                    metric_name="mean IoU in percent",
                    metric_value=result["miou"],
                )
            )
        return found

    # -- body ---------------------------------------------------------------------------------------------------------

    def _values(self) -> dict[str, Any]:
        settings, facts = self.facts.settings, self._facts_here
        task = (settings.get("stages") or {}).get("task")
        return {
            "title": self.title,
            "artefact": self.artefact,
            "names": self.names,
            "name": self.name,
            "on_hub": self.names.on_hub,
            "facts": facts,
            "head": self.facts.segmenter.decode_head if self.facts.segmenter else "",
            "method": self._column,
            "kind": self._kind,
            "frozen": not encoder_learns_task(self._settings),
            "student": self._student(),
            "teacher": self._teacher(),
            "source": task["data"] if task else None,
            "domains": ", ".join(self.report["targets"]) if self.report else ", ".join(settings.get("evaluate") or []),
            "parameters": f"{facts.parameters / 1e6:.2f} M" if facts else None,
            "report": self.report,
            "by_domain": self.by_domain() if self.report else None,
            "by_class": self.by_class() if self.report else None,
            "baselines": [method_title(name) for name in (self.report["baselines"] if self.report else ())],
            "toy": bool(task) and any(is_rendered(settings, name) for name in domain_names(task["data"])),
            "toy_teacher": any(teacher["name"] == "toy" for teacher in teacher_settings(settings)),
            "figure": "report.png" in self.files,
            "unshown": self._unshown(),
            "onnx": "onnx/model.onnx" in self.files,
            "onnx_usage": onnx_usage("onnx/model.onnx" if self.names.on_hub else f"{self.name}/onnx/model.onnx"),
            "handler": "handler.py" in self.files,
            "command": self.facts.command,
            "plan": self._plan(),
            "stages": self._stage_table(),
            "recipe": self._recipe(),
            "versions": markdown_table(["package", "version"], self.facts.versions.items(), align="---"),
            "has_versions": bool(self.facts.versions),
            "seed": settings.get("seed"),
            "commits": self.facts.commits,
            "terms": self._terms(),
            "binding": bool(binding_terms(settings)),
            "licence": self.metadata().license,
            "arxiv": ARXIV,
        }

    def _unshown(self) -> list[str]:
        """Domains that were measured and of which no picture goes with the model."""
        if not self.report:
            return []
        sources = domain_names(self.report["source"]) if self.report["source_result"] else ()
        measured = [*sources, *self.report["targets"]]
        return [name for name in measured if not may_be_shown(self.facts.settings, name)]

    def _student(self) -> str:
        student = self.facts.settings.get("student") or {}
        encoder = student.get("encoder")
        if isinstance(encoder, Mapping):
            kind = MODEL_TITLES.get(encoder.get("model_type"), encoder.get("model_type"))
            return f"a small {kind} that began from random weights"
        if encoder is None:
            return f"a {self._facts_here.architecture}" if self._facts_here else "a vision encoder"
        name = _linked(encoder)
        return name if student.get("pretrained") else f"the architecture of {name}, begun from random weights"

    def _teacher(self) -> str:
        names = [teacher["name"] for teacher in teacher_settings(self.facts.settings)]
        if not names:
            return "a vision foundation model"
        own = {"toy": "the toy ViT that ships with gkd_hf", "???": "a teacher of your choice"}
        *first, last = [own.get(name) or _linked(name) for name in names]
        return f"{', '.join(first)} and {last}" if first else last

    def rows_by_domain(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of mean IoU by domain, in percent: the source first, the mean of the unseen last."""
        report = self.report
        columns = {method_title(name): section for name, section in report["baselines"].items()}
        columns[self._column] = report
        gain = ["gain"] if report["baselines"] else []

        def row(label: str, values: list[float | None], images: str) -> list[str]:
            numbers = [math.nan if value is None else value for value in values]
            gained = [signed(numbers[-1] - numbers[0])] if gain else []
            return [label, *map(percent, numbers), *gained, images]

        rows = []
        if report["source_result"] is not None:
            values = [(section["source_result"] or {}).get("miou") for section in columns.values()]
            rows.append(row(f"{report['source']} (source)", values, str(report["source_result"]["images"])))
        for name, result in report["targets"].items():
            values = [section["targets"].get(name, {}).get("miou") for section in columns.values()]
            rows.append(row(name, values, str(result["images"])))
        means = [section["mean_target_miou"] for section in columns.values()]
        count = len(report["targets"])
        rows.append(row(f"mean of {count} unseen domain{'s' * (count != 1)}", means, ""))
        return ["domain", *columns, *gain, "images"], rows

    @property
    def _settings(self) -> Mapping[str, Any]:
        return self.facts.settings or (self.report or {}).get("settings", {})

    @property
    def _kind(self) -> str:
        """How the student came to be: the kind of its method, or what it is where no label-free stage distilled it."""
        kind, stages = method_kind(self._settings.get("method", "gkd")), self._settings.get("stages")
        if kind != "label_free" or stages is None or any(stage for name, stage in stages.items() if name != "task"):
            return kind
        return "plain" if encoder_learns_task(self._settings) else FROZEN

    @property
    def _column(self) -> str:
        method = self._settings.get("method", "gkd")
        if self._kind == FROZEN:
            return FROZEN
        return UNDISTILLED if self._kind == "plain" != method_kind(method) else method_title(method)

    def by_domain(self) -> str:
        """Markdown table of mean IoU by domain."""
        header, rows = self.rows_by_domain()
        rows[-1] = [f"**{cell}**" if cell else "" for cell in rows[-1]]
        return markdown_table(header, rows)

    def by_class(self) -> str:
        """Markdown table of IoU by class and domain, with the gain over the first baseline in brackets."""
        report = self.report
        sections = {name: (result, "targets") for name, result in report["targets"].items()}
        if report["source_result"] is not None:
            sections = {f"{report['source']} (source)": (report["source_result"], "source")} | sections
        first = next(iter(report["baselines"].values()), None)
        classes = next(iter(sections.values()))[0]["per_class"] if sections else {}
        rows = []
        for label in classes:
            cells = []
            for domain, (result, kind) in sections.items():
                value = result["per_class"][label]
                cell = percent(math.nan if value is None else value)
                other = None
                if first is not None:
                    there = first["source_result"] if kind == "source" else first["targets"].get(domain)
                    other = (there or {}).get("per_class", {}).get(label)
                cells.append(cell if value is None or other is None else f"{cell} ({signed(value - other)})")
            rows.append([label, *cells])
        return markdown_table(["class", *sections], rows)

    def _plan(self) -> str:
        settings = self.facts.settings
        names = [
            name for name, stage in (settings.get("stages") or dict.fromkeys(list(STAGES)[:3], True)).items() if stage
        ]
        method, labelled = settings.get("method", "gkd"), STAGES["task"][0]
        baselines = settings.get("baselines") or []
        if self._kind in ("one_stage", "plain"):
            names = ["task"]
        rows = [[f"`{name}`", *STAGES[name]] for name in names]
        if self._kind == "one_stage":
            trains = METHODS[method].trains if method in METHODS else f"{END_TO_END}, by {method}"
            rows = [["`task`", labelled, trains]]
        elif names[-1] == "task" and encoder_learns_task(settings):
            rows[-1] = ["`task`", labelled, END_TO_END]
        if any(compares_logits(name, settings.get(name) or {}) for name in (method, *baselines)):
            rows.insert(len(rows) - 1, ["`teacher_head`", *STAGES["teacher_head"]])
        rows += [[f"`{name}`", labelled, METHODS[name].trains] for name in baselines]
        return markdown_table(["stage", "data", "what is trained"], rows, align="---")

    def _stage_table(self) -> str | None:
        if not self.facts.stages:
            return None
        rows = []
        for name, stage in self.facts.stages.items():
            stages = self.facts.settings.get("stages") or {}
            recipe = stages.get(name) or stages.get("task") or {}  # baselines and the teacher's head are as the task
            losses = ", ".join(f"{key.removeprefix('loss_')} {value:.4g}" for key, value in stage.losses.items())
            data = recipe.get("data", "–")
            rows.append(
                [f"`{name}`", data, stage.steps, stage.batch_size, f"{stage.learning_rate:.3g}", losses or "–"]
                + [f"{stage.seconds:.0f} s", f"{stage.hardware}, {stage.precision}"]
            )
        header = ["stage", "data", "steps", "batch", "learning rate", "last losses", "time", "on"]
        return markdown_table(header, rows, align="---")

    def _recipe(self) -> str | None:
        if "stages" not in self.facts.settings:
            return None
        settings = {key: value for key, value in shortened(self.facts.settings).items() if key != "hub"}
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()

    def _terms(self) -> str | None:
        settings = self.facts.settings
        if not settings:
            return None
        terms = ingredients(settings)
        known = {each.name for each in terms}
        terms += [
            data_terms(settings, name, "measured on") for name in settings.get("evaluate") or [] if name not in known
        ]
        rows = [[each.role, f"`{shortened(each.name)}`", each.words, each.page or "–"] for each in terms]
        return markdown_table(["used as", "what", "licence", "page"], rows, align="---")


def report_table(report: Mapping[str, Any]) -> str:
    """The table of mean IoU by domain of a report.json, for the terminal."""
    card = GKDModelCard("segmenter", RunFacts(dict(report["settings"])), RepoNames("", ""), report)
    header, rows = card.rows_by_domain()
    sources = len(rows) - 1 - len(report["targets"])
    groups = [rows[:sources], rows[sources:-1], rows[-1:]]
    title = f"mIoU in percent · trained on {report['source']}"
    return f"{title}\n{box_table(header[:-1], [[row[:-1] for row in group] for group in groups])}"


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{shortened(name)}`"
