"""The card of a prepared data set: README.md, whose head tells the Hub and datasets what the files are."""

from __future__ import annotations

from datasets import DatasetInfo, Features, Image, Value
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from gkd_hf.data.bad_rows import count_by_reason
from gkd_hf.data.domains import DOMAINS, Domain
from gkd_hf.data.manifest import Manifest, Split

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ origin }}

{{ terms }}

## Splits

{{ splits }}

{{ labels }}

## Columns

- `image`: {{ image }}
- `label`: {{ label }}
- `id`: name of the sample in the data set as distributed
- `domain`: `{{ domain }}`

`manifest.json` holds the SHA-256 and number of rows of every file, and the settings they were made with.

## Use

```python
from datasets import load_dataset

rows = load_dataset("FOLDER_OR_HUB_ID", split="{{ first_split }}", streaming=True)
```
"""


def card_text(manifest: Manifest) -> str:
    """Return README.md for a prepared data set: a function of the manifest alone, without times and paths."""
    base = manifest.domain.partition(":")[0]
    entry = DOMAINS.get(base, DOMAINS["custom"])
    card = DatasetCard.from_template(
        _card_data(manifest, entry),
        template_str=_TEMPLATE,
        title=manifest.domain,
        origin=_origin(entry),
        terms=_terms(entry),
        splits=_split_table(manifest),
        labels=_label_section(manifest),
        image=_image_text(manifest.settings.get("re_encode")),
        label=_label_text(manifest),
        domain=manifest.domain,
        first_split=next(iter(manifest.splits)),
    )
    return str(card)


def _card_data(manifest: Manifest, entry: Domain) -> DatasetCardData:
    licence: dict[str, str] = {"license": entry.licence_id} if entry.licence_id else {}
    if entry.licence_id == "other":
        licence |= {"license_name": f"{entry.name.replace('_', '-')}-terms", "license_link": entry.home_page}
    data = DatasetCardData(
        pretty_name=manifest.domain,
        task_categories=["image-segmentation"] if manifest.labels else ["image-feature-extraction"],
        tags=["semantic-segmentation", "gkd_hf"] if manifest.labels else ["gkd_hf"],
        size_categories=[_size_category(sum(split.rows for split in manifest.splits.values()))],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{name}-*.parquet"} for name in manifest.splits],
            }
        ],
        **{name: value for name, value in licence.items() if value},
    )
    info = DatasetInfo(
        features=Features({"image": Image(), "label": Image(), "id": Value("string"), "domain": Value("string")}),
        splits=[
            {"name": name, "num_bytes": split.image_bytes + split.label_bytes, "num_examples": split.rows}
            for name, split in manifest.splits.items()
        ],
        download_size=sum(shard.bytes for shard in manifest.shards),
        dataset_size=sum(split.image_bytes + split.label_bytes for split in manifest.splits.values()),
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data


def _size_category(rows: int) -> str:
    steps = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in steps if rows < limit), "1M<n<10M")


def _origin(entry: Domain) -> str:
    if entry.name == "custom":
        return "Images prepared as parquet shards with gkd_hf's `scripts/prepare_domain.py`."
    place = f" ({entry.home_page})" if entry.home_page else ""
    return (
        f"The data set `{entry.name}`{place}, prepared as parquet shards with gkd_hf's `scripts/prepare_domain.py` "
        "from the files as its publishers distribute them."
    )


def _terms(entry: Domain) -> str:
    if not entry.licence:
        return "**Terms:** those of whoever made the images; say here which."
    return (
        f"**Terms:** {entry.licence}. They hold for this copy too: before others are given access, make sure that "
        "the terms allow it."
    )


def _split_table(manifest: Manifest) -> str:
    lines = ["| split | images | width × height | images, MB | labels, MB | files |", "|---|---|---|---|---|---|"]
    for name, split in manifest.splits.items():
        sizes = " to ".join(dict.fromkeys(f"{width} × {height}" for width, height in (split.smallest, split.largest)))
        lines.append(
            f"| {name} | {split.rows:,} | {sizes} | {split.image_bytes / 1e6:,.1f} | {split.label_bytes / 1e6:,.1f} "
            f"| {len(split.shards)} |"
        )
    for name, split in manifest.splits.items():
        if split.left_out:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in count_by_reason(split.left_out).items())
            lines += ["", f"Left out of {name}, as listed in `manifest.json`: {reasons}."]
    return "\n".join(lines)


def _label_section(manifest: Manifest) -> str:
    if manifest.classes is None:
        return "There are no labels."
    labelled = {name: split for name, split in manifest.splits.items() if split.pixels is not None}
    lines = [
        "## Classes",
        "",
        "Share of each class among the labelled pixels, and of the pixels without a class among all.",
        "",
        "| train id | class | " + " | ".join(labelled) + " |",
        "|" + "---|" * (2 + len(labelled)),
    ]
    for index, name in enumerate(manifest.classes):
        shares = " | ".join(_share(split.pixels[index], sum(split.pixels)) for split in labelled.values())
        escaped = name.replace("|", "\\|")
        lines.append(f"| {index} | {escaped} | {shares} |")
    ignored = " | ".join(_share(split.ignored_pixels, _all_pixels(split)) for split in labelled.values())
    return "\n".join([*lines, f"| 255 | *ignored* | {ignored} |"])


def _all_pixels(split: Split) -> int:
    return sum(split.pixels or ()) + (split.ignored_pixels or 0)


def _share(pixels: int | None, total: int) -> str:
    return f"{100 * (pixels or 0) / total:.2f} %" if total else "–"


def _image_text(re_encode: str | None) -> str:
    if re_encode is None:
        return "the picture's own bytes as distributed; only pieces of larger pictures are encoded anew"
    return f"the picture, encoded anew (`{re_encode}`)"


def _label_text(manifest: Manifest) -> str:
    if manifest.labels is None:
        return "empty"
    return f"PNG of one train id per pixel: 0 to {len(manifest.classes or ()) - 1} as above, 255 is ignored"
