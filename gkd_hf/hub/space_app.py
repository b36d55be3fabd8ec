"""Two segmenters side by side on one picture: overlay, legend, areas, and where they disagree.

Runs as a Hugging Face Space as it is (``models.json`` beside it names the models), or from `scripts/demo.py`. Needs
gradio, torch, transformers, pillow and numpy. It sends nothing to anybody.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # both are read at import
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING  # noqa: E402

Colour = tuple[int, int, int]
LONGEST_SIDE = (640, 1280)  # pixels of the longer side at which pictures are shown: at least, at most
REMEMBERED = 16  # predictions, so that moving the slider does not run a model again

# The Cityscapes palette, and other data sets' words for the same things.
STREET: dict[str, Colour] = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
    "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0), "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180),
    "person": (220, 20, 60), "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100),
    "train": (0, 80, 100), "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
}  # fmt: skip
SYNONYMS = {"pavement": "sidewalk", "tree": "vegetation", "sign": "traffic sign", "pedestrian": "person",
            "bicyclist": "rider"}  # fmt: skip
# For all other names: Okabe and Ito's and Tol's "muted" colours, which can be told apart with any colour vision.
DISTINCT: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (51, 34, 136), (136, 204, 238), (68, 170, 153), (17, 119, 51), (153, 153, 51), (221, 204, 119), (204, 102, 119),
    (136, 34, 85), (170, 68, 153),
)  # fmt: skip


class Segmenter:
    """A model, its processor, and the class names in the order of its ids.

    Args:
        name: what the page calls it. model, processor: as transformers' Auto classes load them.
    """

    def __init__(self, name: str, model: PreTrainedModel, processor: Any):
        self.name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.processor = processor
        self.labels = [model.config.id2label[index] for index in range(model.config.num_labels)]

    @classmethod
    def load(cls, source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Segmenter:
        """Load a Hub id or a folder; ``trust_remote_code`` runs the code that it comes with."""
        # Always said, for unless it is transformers may ask on the terminal.
        settings = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(source, **settings)
        universal = type(config) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
        auto_class = AutoModelForUniversalSegmentation if universal else AutoModelForSemanticSegmentation
        model = auto_class.from_pretrained(source, use_safetensors=True, **settings)
        return cls(source, model, AutoImageProcessor.from_pretrained(source, **settings))

    @torch.inference_mode()
    def predict(self, image: Image.Image) -> np.ndarray:
        """Return the class id of every pixel, H×W, at the image's own size."""
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        outputs = self.model(pixel_values=pixels)
        if "class_queries_logits" in outputs:  # Mask2Former's semantic inference
            classes = outputs["class_queries_logits"].softmax(-1)[..., :-1]
            scores = torch.einsum("bqk,bqhw->bkhw", classes, outputs["masks_queries_logits"].sigmoid())
        else:
            scores = outputs["logits"]
        best = labels = None
        for index in range(scores.shape[1]):  # one by one: all classes at the picture's size may be gigabytes
            score = F.interpolate(scores[:, index : index + 1], size=image.size[::-1], mode="bilinear")[0, 0]
            labels = (
                torch.zeros_like(score, dtype=torch.int64)
                if best is None
                else torch.where(score > best, index, labels)
            )
            best = score if best is None else torch.maximum(best, score)
        return labels.cpu().numpy()


class Predictions:
    """The segmenters by name, and their latest results."""

    def __init__(self, segmenters: Iterable[Segmenter]):
        self.segmenters = {segmenter.name: segmenter for segmenter in segmenters}
        self.colours = palette(name for segmenter in self.segmenters.values() for name in segmenter.labels)
        self._known: OrderedDict[tuple[str, bytes], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str, image: Image.Image) -> np.ndarray:
        """H×W class ids of ``image`` by the segmenter ``name``."""
        key = (name, hashlib.sha256(image.tobytes() + repr(image.size).encode()).digest())
        with self._lock:
            if key not in self._known:
                self._known[key] = self.segmenters[name].predict(image)
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key]


def palette(names: Iterable[str]) -> dict[str, Colour]:
    """One colour for each class name, always the same for the same names: Cityscapes' for its classes."""
    colours: dict[str, Colour] = {}
    taken: set[Colour] = set()
    for name in dict.fromkeys(names):
        word = meaning(name)
        if word in STREET:
            colours[name] = STREET[word]
            continue
        # A name's own place in the list, or the next that is free; when none is, the list again, darker.
        start, shade = zlib.crc32(word.encode()), 1.0
        while True:
            free = (DISTINCT[(start + step) % len(DISTINCT)] for step in range(len(DISTINCT)))
            free = (tuple(round(value * shade) for value in colour) for colour in free)
            colour = next((colour for colour in free if colour not in taken), None)
            if colour is not None:
                break
            shade *= 0.75
        colours[name] = colour
        taken.add(colour)
    return colours


def meaning(name: str) -> str:
    """The word that Cityscapes has for a class, or the name in lower case."""
    word = name.strip().lower().replace("_", " ")
    return SYNONYMS.get(word, word)


def shown_size(image: Image.Image) -> Image.Image:
    """The picture at the size at which it is shown: tiny ones larger, huge ones smaller."""
    image = image.convert("RGB")
    longest, (least, most) = max(image.size), LONGEST_SIDE
    if least <= longest <= most:
        return image
    scale = (least if longest < least else most) / longest
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)


def overlay(image: Image.Image, classes: np.ndarray, colours: Sequence[Colour], opacity: float) -> Image.Image:
    """Lay the classes' colours over the picture, and a light line between classes.

    Args:
        classes: H×W ids. colours: of the ids. opacity: 0 (the picture) to 1 (colours only).
    """
    pixels = np.asarray(image, dtype=np.float32)
    mixed = (1 - opacity) * pixels + opacity * np.asarray(colours, dtype=np.float32)[classes]
    line = borders(classes)[..., None] * min(1.0, 2 * opacity) * 0.85
    return Image.fromarray((mixed + line * (255 - mixed)).round().astype(np.uint8))


def borders(classes: np.ndarray) -> np.ndarray:
    """H×W, True where the pixel to the left or above is of another class."""
    edge = np.zeros(classes.shape, dtype=bool)
    edge[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    edge[1:] |= classes[1:] != classes[:-1]
    return edge


def areas(classes: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Percent of the picture by class name, largest first; classes that are not seen come last, with 0."""
    counts = np.bincount(classes.ravel(), minlength=len(labels))
    shares = dict.fromkeys(labels, 0.0)
    for label, count in zip(labels, counts, strict=True):
        shares[label] += 100 * int(count) / classes.size
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def legend(shares: dict[str, float], colours: dict[str, Colour]) -> str:
    """HTML table: colour, class name, area in percent; one line for the classes that are not seen."""
    rows = []
    for name, share in shares.items():
        if share > 0:
            colour = "rgb({}, {}, {})".format(*colours[name])
            rows.append(
                f'<tr><td><span class="swatch" style="background: {colour}"></span></td>'
                f'<td class="name">{html.escape(name)}</td>'
                f'<td class="bar"><span style="width: {share:.2f}%; background: {colour}"></span></td>'
                f'<td class="share">{_percent(share)}</td></tr>'
            )
    absent = ", ".join(html.escape(name) for name, share in shares.items() if share == 0)
    absent = f'<p class="absent">not seen: {absent}</p>' if absent else ""
    return f'<table class="areas">{"".join(rows)}</table>{absent}'


def disagreement(
    image: Image.Image, left: np.ndarray, right: np.ndarray, left_labels: Sequence[str], right_labels: Sequence[str]
) -> tuple[Image.Image, str]:
    """Show in orange on the greyed picture where two segmenters name different classes, and say how much that is.

    Args:
        left, right: H×W ids. left_labels, right_labels: class names of the ids; what they mean is compared, not ids.
    """
    names = list(dict.fromkeys(meaning(name) for name in [*left_labels, *right_labels]))
    one = np.asarray([names.index(meaning(name)) for name in left_labels])[left]
    two = np.asarray([names.index(meaning(name)) for name in right_labels])[right]
    differ = one != two
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) * 0.6 + 90
    mixed = np.where(differ[..., None], 0.25 * grey + 0.75 * np.asarray((230, 120, 0)), grey)
    picture = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    share = 100 * differ.mean()
    if not differ.any():
        return picture, '<p class="verdict">They agree everywhere.</p>'
    pairs, counts = np.unique(one[differ] * len(names) + two[differ], return_counts=True)
    rows = ""
    for i in np.argsort(-counts)[:5]:
        first, second = (html.escape(names[index]) for index in divmod(pairs[i], len(names)))
        rows += (
            f'<tr><td>{first}</td><td>{second}</td><td class="share">{_percent(100 * counts[i] / one.size)}</td></tr>'
        )
    return picture, (
        f'<p class="verdict">They disagree on <b>{_percent(share)}</b> of the picture, most of all where</p>'
        f'<table class="areas"><tr><th>the left says</th><th>the right says</th><th></th></tr>{rows}</table>'
    )


def _percent(share: float) -> str:
    return f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"


CSS = """
.gradio-container {width: 100%; max-width: 1480px !important; margin: 0 auto}
.examples .grid-wrap {max-height: none !important; padding: 0 !important; overflow: visible !important}
.examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important;
  grid-auto-rows: auto !important; padding: 0 !important}
.examples .grid-container button {min-width: 0; min-height: 0; width: 100%; height: auto; aspect-ratio: 1}
.examples, .examples .gallery-container, .examples .grid-wrap {min-height: 0 !important; height: auto !important}
.examples img {background: var(--background-fill-secondary)}
.areas {width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; border: none !important}
.areas tr, .areas td, .areas th {border: none !important; padding: 3px 6px 3px 0 !important; text-align: left}
.areas tr:nth-child(even) {background: none !important}
.areas td:first-child:has(.swatch) {width: 1.5em}
.areas th {font-weight: 500; color: var(--body-text-color-subdued)}
.areas .swatch {display: inline-block; width: 1em; height: 1em; border-radius: 3px; vertical-align: -0.12em;
  box-shadow: 0 0 0 1px rgba(128, 128, 128, 0.6)}
.areas .name {white-space: nowrap; width: 1%; padding-right: 14px !important}
.areas .bar span {display: block; height: 0.55em; min-width: 2px; border-radius: 3px;
  box-shadow: 0 0 0 1px rgba(128, 128, 128, 0.35)}
.areas .share {text-align: right; white-space: nowrap; width: 4.5em}
.absent {color: var(--body-text-color-subdued); font-size: 0.9em; margin-top: 6px}
.verdict {margin: 0 0 6px 0}
"""


def build(segmenters: Sequence[Segmenter], examples: Sequence[str | Path] = ()) -> gr.Blocks:
    """Make the page for one segmenter or more. ``examples``: picture files that can be clicked on."""
    predictions = Predictions(segmenters)
    names = list(predictions.segmenters)
    two = len(names) > 1

    def look(name: str, image: Image.Image, opacity: float) -> tuple[Image.Image, str]:
        classes, labels = predictions.of(name, image), predictions.segmenters[name].labels
        picture = overlay(image, classes, [predictions.colours[label] for label in labels], opacity / 100)
        return picture, legend(areas(classes, labels), predictions.colours)

    def segment(image: Image.Image | None, opacity: float, *chosen: str) -> list[Any]:
        if image is None:
            return [None, ""] * (3 if two else 1)
        image = shown_size(image)
        results: list[Any] = []
        for name in chosen or names:
            results += look(name, image, opacity)
        if two:
            ids = [predictions.of(name, image) for name in chosen]
            results += disagreement(image, *ids, *(predictions.segmenters[name].labels for name in chosen))
        return results

    def example(chosen: gr.SelectData) -> Image.Image:
        return _opened(examples[chosen.index])

    with gr.Blocks(title="Segmenters side by side", analytics_enabled=False) as page:
        gr.Markdown(
            "# Segmenters side by side\nOne picture, two models: what each of them sees, and where they disagree."
            if two
            else f"# {names[0]}\nWhat the model sees in a picture, and how much of it."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                first = str(examples[0]) if examples else None
                image = gr.Image(first, type="pil", show_label=False, sources=["upload", "clipboard"], height=300)
                opacity = gr.Slider(0, 100, value=55, step=5, label="Colour opacity (%)")
                if examples:
                    gr.Markdown("Or one of these")
                    thumbnails = gr.Gallery(
                        [_thumbnail(path) for path in examples], columns=4, height="auto", object_fit="contain",
                        allow_preview=False, interactive=False, show_label=False, container=False, buttons=[],
                        elem_classes="examples",
                    )  # fmt: skip
                    thumbnails.select(example, None, image, api_visibility="private")
            outputs: list[Any] = []
            chosen: list[gr.Dropdown] = []
            for side, name in zip(("Left", "Right"), names, strict=False):
                with gr.Column(scale=3, min_width=300):
                    if two:
                        chosen.append(gr.Dropdown(names, value=name, label=f"{side} model", interactive=True))
                    outputs += [_shown(), gr.HTML()]
        if two:
            gr.Markdown("### Where the two disagree")
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    outputs.append(_shown(height=400))
                with gr.Column(scale=3, min_width=300):
                    outputs.append(gr.HTML())
        triggers = [page.load, image.change, opacity.release, *(dropdown.input for dropdown in chosen)]
        gr.on(triggers, segment, [image, opacity, *chosen], outputs, api_name="segment")
    return page


def _opened(path: str | Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def _thumbnail(path: str | Path) -> Image.Image:
    """The whole picture, small, which is all that the page loads of it before somebody clicks on it."""
    image = _opened(path)
    image.thumbnail((320, 320))
    return image


def _shown(height: int | None = None) -> gr.Image:
    buttons = ["download", "fullscreen"]
    return gr.Image(show_label=False, interactive=False, format="png", height=height, buttons=buttons)


def launch(page: gr.Blocks, **settings: Any) -> Any:
    """Serve the page without a public link and without anything from another server; see ``gr.Blocks.launch``."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    quiet = {"background_fill": "transparent", "text_color": "*body_text_color_subdued"}
    theme = theme.set(
        **{f"block_title_{key}{mode}": value for key, value in quiet.items() for mode in ("", "_dark")},
        block_title_padding="0",
        block_label_text_color="*body_text_color_subdued",
        body_background_fill="*neutral_100",
    )
    defaults = {"share": False, "ssr_mode": False, "footer_links": ["api"], "show_error": True}
    return page.launch(theme=theme, css=CSS, **(defaults | settings))


def main() -> None:
    """Serve the models of ``models.json``, as a Space does."""
    folder = Path(__file__).resolve().parent
    settings = json.loads((folder / "models.json").read_text(encoding="utf-8"))
    trust = settings["trust_remote_code"]
    segmenters = [
        Segmenter.load(model["id"], revision=model["revision"], trust_remote_code=trust)
        for model in settings["models"]
    ]
    launch(build(segmenters, sorted((folder / "examples").glob("*"))))


if __name__ == "__main__":
    main()
