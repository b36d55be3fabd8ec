"""The report of a run: mean IoU by domain and class, with and without distillation, as JSON, Markdown and PNG.

Domains are the point of the method, so nothing is averaged away: every domain and every class keeps its figure, and
the source's own held-out result stands apart from the domains that training never saw.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import gkd_hf
from gkd_hf.data.bad_rows import count_by_reason, distinct
from gkd_hf.data.domains import domain_names
from gkd_hf.errors import InputError
from gkd_hf.evaluation.mean_iou import scores
from gkd_hf.evaluation.report_figure import FigureCell, FigureRow, draw_report
from gkd_hf.evaluation.report_text import box_table, flatten, markdown_table, percent, signed, write_whole
from gkd_hf.methods import FROZEN, METHODS, UNDISTILLED, encoder_learns_task, method_title

if TYPE_CHECKING:
    from gkd_hf.data.domains import LabelSpace

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate")
MAX_LISTED_ROWS = 50


@dataclass
class DomainResult:
    """What the evaluation of one domain leaves behind.

    Attributes:
        domain: name of the domain.
        confusion: int64 C×C count over all its images, rows = truth.
        images: number of images counted.
        skipped: the rows that could not be read, each with `domain`, `id` and `reason`.
        examples: up to two of (image uint8 H×W×3, truth uint8 h×w with 255 = ignored, prediction uint8 h×w).
    """

    domain: str
    confusion: torch.Tensor
    images: int
    skipped: list[dict[str, Any]] = field(default_factory=list)
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def mean_iou(self) -> float:
        """Mean IoU in percent; nan if no labelled pixel was counted."""
        return 100 * scores(self.confusion)["mean_iou"]

    @property
    def per_class_iou(self) -> list[float]:
        """IoU of each class in percent, nan for a class that does not occur."""
        return [100 * value for value in scores(self.confusion)["per_class_iou"]]


class DomainReport:
    """Collects `DomainResult`s and writes report.json, report.md and report.png.

    Args:
        source: the source domain, or several joined by "+". Results of these domains are the held-out check of the
            source; those of all other domains are targets.
        label_space: names and colours of the classes.
        settings: the resolved recipe, or any nested mapping that tells how the run was made; its
            stages.task.freeze_encoder says of a label-free method whether the encoder learned the task, too.
        seed: the run's seed.
        method: one of `METHODS`, or "frozen".
    """

    def __init__(
        self, source: str, label_space: LabelSpace, settings: Mapping[str, Any], seed: int, *, method: str = "gkd"
    ) -> None:
        self.source = source
        self.label_space = label_space
        self.settings = settings
        self.seed = seed
        unfrozen = encoder_learns_task({**settings, "method": "gkd" if method == FROZEN else method})
        if method == FROZEN:
            self.method = UNDISTILLED if unfrozen else FROZEN
            self._student = METHODS["none"].student if unfrozen else "as it was, its encoder frozen"
        else:
            self.method, self._student = method_title(method), METHODS[method].student
            if METHODS[method].kind == "label_free" and unfrozen:
                self._student += ", then trained end to end with its head"
        self.results: dict[str, DomainResult] = {}
        self.baselines: dict[str, dict[str, DomainResult]] = {}
        self.skipped_rows: list[dict[str, Any]] = []

    def add(self, result: DomainResult, baseline: str | None = None) -> None:
        """Add the method's result on one domain, or that of a baseline ("none" = the student alone).

        Raises:
            InputError: the count does not fit the label space, or the domain has been added before.
        """
        classes = len(self.label_space.classes)
        if tuple(result.confusion.shape) != (classes, classes):
            raise InputError(
                f"The result of '{result.domain}' counts {tuple(result.confusion.shape)} classes, but the label space "
                f"'{self.label_space.name}' has {classes}; evaluate with the label space of the head."
            )
        results = self.results if baseline is None else self.baselines.setdefault(baseline, {})
        if result.domain in results:
            raise InputError(f"Domain '{result.domain}' is evaluated twice; name each domain once.")
        results[result.domain] = result
        self.add_skipped_rows(result.skipped)

    def add_skipped_rows(self, rows: list[dict[str, Any]]) -> None:
        """List rows that were skipped, in training or evaluation; a row already listed is not repeated."""
        self.skipped_rows = distinct([*self.skipped_rows, *rows])

    def as_dict(self) -> dict[str, Any]:
        """Return the content of report.json: IoUs in percent, None where nothing was counted."""
        report = {"source": self.source, **self._section(self.results)}
        report["baselines"] = {name: self._section(results) for name, results in self.baselines.items()}
        report["skipped_rows"] = self.skipped_rows
        report["skipped_by_reason"] = count_by_reason(self.skipped_rows)
        report["settings"] = dict(self.settings)
        report["versions"] = package_versions()
        report["seed"] = self.seed
        return _json_value(report)

    def table(self) -> str:
        """Return the table of mean IoU by domain for the terminal, the mean over the unseen domains last."""
        header = ["domain", *self._column_titles()]
        source_rows, target_rows, mean_row = self._table_rows()
        skipped = len(self.skipped_rows)
        lines = [f"mIoU in percent · trained on {self.source} · {len(self.label_space.classes)} classes"]
        if skipped:
            lines.append(f"{skipped} bad row{'s' * (skipped > 1)} skipped, listed in report.md")
        return "\n".join(
            [
                *lines,
                box_table(header, [[row[:-1] for row in group] for group in (source_rows, target_rows, [mean_row])]),
            ]
        )

    def markdown(self) -> str:
        """Return the content of report.md."""
        source_rows, target_rows, mean_row = self._table_rows()
        mean_row = [f"**{cell}**" if cell else "" for cell in mean_row]
        classes = ", ".join(self.label_space.classes)
        parts = [
            f"# {self.method} from {self.source}: results by domain",
            f"Label space {self.label_space.name}, {len(self.label_space.classes)} classes: {classes}.",
            "![Examples: image, truth and predictions of each domain](report.png)",
            "## By domain",
            "Mean IoU in percent over all images of the domain.",
            markdown_table(["domain", *self._column_titles(), "images"], [*source_rows, *target_rows, mean_row]),
            "## By class",
            f"IoU of {self.method} in percent{self._class_note()}; – where the class does not occur.",
            self._class_table(),
            "## Skipped rows",
            self._skipped_list(),
            "## How to read this",
            self._explanation(),
            "## Settings",
            markdown_table(["setting", "value"], flatten(_json_value(dict(self.settings))), align="---"),
            "## Versions",
            markdown_table(["package", "version"], [*package_versions().items(), ("seed", self.seed)], align="---"),
        ]
        return "\n\n".join(parts) + "\n"

    def write(self, output_dir: str | Path) -> None:
        """Write report.png, report.md and, last, report.json: each appears whole or not at all."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.draw(folder / "report.png")
        write_whole(folder / "report.md", lambda path: path.write_text(self.markdown(), encoding="utf-8"))
        content = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(folder / "report.json", lambda path: path.write_text(content, encoding="utf-8"))

    def draw(self, path: str | Path, shown: Collection[str] | None = None) -> None:
        """Write the picture of the report as a PNG, whole or not at all: a row for each domain.

        Args:
            path: the file.
            shown: domains of which pictures, truth and predictions may be in it, for a picture that is passed on;
                the others have no row. None: all.

        Raises:
            InputError: no domain is left.
        """
        domains = [name for each in self._domains() for name in each if shown is None or name in shown]
        if shown is not None and not domains:
            raise InputError(f"there is nothing to draw into {path}: none of its domains is in the report")
        write_whole(Path(path), lambda place: self._draw(place, domains))

    # What the three forms of the report share.

    def _is_source(self, domain: str) -> bool:
        return domain in domain_names(self.source)

    def _domains(self) -> tuple[list[str], list[str]]:
        """Source and target domains, each in the order in which they were first added."""
        names = list(dict.fromkeys([*self.results, *(name for each in self.baselines.values() for name in each)]))
        return [n for n in names if self._is_source(n)], [n for n in names if not self._is_source(n)]

    def _columns(self) -> dict[str, dict[str, DomainResult]]:
        """Results by column title, from the baseline that all is compared with to the method itself."""
        names = sorted(self.baselines, key=lambda name: name != "none")
        return {method_title(name): self.baselines[name] for name in names} | {self.method: self.results}

    def _column_titles(self) -> list[str]:
        return [*self._columns(), "gain"] if self.baselines else [self.method]

    def _section(self, results: dict[str, DomainResult]) -> dict[str, Any]:
        held_out = [result for name, result in results.items() if self._is_source(name)]
        section: dict[str, Any] = {
            "targets": {name: self._entry(result) for name, result in results.items() if not self._is_source(name)},
            "mean_target_miou": _mean([result.mean_iou for n, result in results.items() if not self._is_source(n)]),
            "source_result": None,
        }
        if held_out:
            pooled = DomainResult(
                self.source,
                torch.stack([result.confusion.cpu() for result in held_out]).sum(0),
                sum(result.images for result in held_out),
                [row for result in held_out for row in result.skipped],
            )
            section["source_result"] = self._entry(pooled)
        return section

    def _entry(self, result: DomainResult) -> dict[str, Any]:
        return {
            "miou": result.mean_iou,
            "per_class": dict(zip(self.label_space.classes, result.per_class_iou, strict=True)),
            "images": result.images,
            "skipped": len(result.skipped),
        }

    def _table_rows(self) -> tuple[list[list[str]], list[list[str]], list[str]]:
        sources, targets = self._domains()
        columns = self._columns()

        def values(domain: str) -> list[float]:
            return [results[domain].mean_iou if domain in results else math.nan for results in columns.values()]

        def row(label: str, figures: list[float], images: str) -> list[str]:
            gain = [signed(figures[-1] - figures[0])] if self.baselines else []
            return [label, *map(percent, figures), *gain, images]

        def images(domain: str) -> str:
            return str(max(results[domain].images for results in columns.values() if domain in results))

        by_target = [values(domain) for domain in targets]
        # A column that lacks a domain which another has would be a mean over an easier or a harder set: no mean then.
        known = [figures for figures in by_target if not all(map(math.isnan, figures))]
        means = [sum(column) / len(known) for column in zip(*known, strict=True)] or [math.nan] * len(columns)
        source_rows = [row(f"{domain} (source)", values(domain), images(domain)) for domain in sources]
        target_rows = [row(domain, v, images(domain)) for domain, v in zip(targets, by_target, strict=True)]
        count = len(known)
        return (source_rows, target_rows, row(f"mean of {count} unseen domain{'s' * (count != 1)}", means, ""))

    def _class_note(self) -> str:
        return f", in brackets the gain over {next(iter(self._columns()))}" if self.baselines else ""

    def _class_table(self) -> str:
        sources, targets = self._domains()
        domains = [name for name in [*sources, *targets] if name in self.results]
        first = next(iter(self._columns().values()))
        rows = []
        for index, name in enumerate(self.label_space.classes):
            cells = []
            for domain in domains:
                value = self.results[domain].per_class_iou[index]
                gain = math.nan
                if self.baselines and domain in first:
                    gain = value - first[domain].per_class_iou[index]
                cells.append(percent(value) + ("" if math.isnan(gain) else f" ({signed(gain)})"))
            rows.append([name, *cells])
        rows.append(["**mean**", *(f"**{percent(self.results[domain].mean_iou)}**" for domain in domains)])
        return markdown_table(["class", *domains], rows)

    def _skipped_list(self) -> str:
        if not self.skipped_rows:
            return "None: every row could be read."
        by_reason = count_by_reason(self.skipped_rows)
        counts = "\n".join(f"- {count} × {' '.join(reason.split())}" for reason, count in by_reason.items())
        keys = ("domain", "id", "shard", "row", "reason")
        shown = [["" if row.get(key) is None else row[key] for key in keys] for row in self.skipped_rows]
        more = len(shown) - MAX_LISTED_ROWS
        table = markdown_table(keys, shown[:MAX_LISTED_ROWS], align="---")
        note = f"\n\nand {more} more, all in report.json." if more > 0 else ""
        return f"{counts}\n\nRows are counted from 0 within their shard.\n\n{table}{note}"

    def _explanation(self) -> str:
        compared = [
            *(
                f"- **{method_title(name)}** is the same student with the same head, trained for as many task steps, "
                + ("but not distilled." if name == "none" else f"{METHODS[name].student}.")
                for name in sorted(self.baselines, key=lambda name: name != "none")
            ),
            f"- **gain** is {self.method} minus {next(iter(self._columns()))}, in points of mean IoU.",
        ]
        lines = [
            f"- The labels of **{self.source}** (source) are the only ones training saw; its row is measured on "
            "images held out from training. All other domains are the targets, unseen in training.",
            f"- **{self.method}** is the student {self._student}.",
            *(compared if self.baselines else []),
            "- IoU of a class = correct pixels / (pixels of the class in truth or prediction), summed over all images "
            "of the domain first. The mean is over the classes that occur; ignored pixels (255) never count.",
            "- The last row is the mean over the unseen domains, each weighing the same however many images it has.",
            "- report.png shows the first image of each domain, not a chosen one.",
        ]
        return "\n".join(lines)

    def _draw(self, path: Path, domains: list[str]) -> None:
        columns = self._columns()
        rows = []
        for domain in domains:
            examples = next((r[domain].examples for r in reversed(columns.values()) if domain in r), [])
            cells = []
            for title, results in columns.items():
                result = results.get(domain)
                label = f"{title} · mIoU {percent(result.mean_iou if result else math.nan)}"
                cells.append(FigureCell(label, result.examples[0][2] if result and result.examples else None))
            image, truth = examples[0][:2] if examples else (None, None)
            title = f"{domain} (source)" if self._is_source(domain) else domain
            rows.append(FigureRow(title, image, truth, cells))
        heading = f"{self.method} from {self.source} · mIoU in percent, over all images of the domain"
        draw_report(path, heading, rows, self.label_space.classes, self.label_space.palette)


def package_versions() -> dict[str, str]:
    """Versions of what the figures depend on: Python, gkd_hf and the libraries under it."""
    versions = {"python": platform.python_version()}
    for package in ("gkd_hf", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # Only the package itself can run without being installed: from its source tree.
            versions[package] = f"{gkd_hf.__version__} (source tree)" if package == "gkd_hf" else "not installed"
    return versions


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _json_value(value: Any) -> Any:
    """Make `value` plain JSON: nan and infinity become None, paths and other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value if value is None or isinstance(value, str | bool | int) else str(value)
