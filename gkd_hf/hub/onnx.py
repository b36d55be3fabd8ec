"""A segmenter as an ONNX graph that takes any batch and any image size, compared with PyTorch before it is kept."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from gkd_hf.errors import InputError
from gkd_hf.hub.native import class_logits, load_segmenter
from gkd_hf.models.loading import image_statistics
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation
from gkd_hf.models.pull import CONFIGURATION, pull

TOLERANCE = 1e-4
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# No square, and at no stride as large as the grid that positions were learned on: what a model does for such sizes
# alone must not become the graph.
TRACED_SIZE = (96, 160)


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        file: the graph. opset: of the default domain. labels: class names in the order of the logits' channels.
        differences: (batch, height, width) → largest absolute difference of the logits to PyTorch's.
    """

    file: Path
    opset: int
    labels: list[str]
    differences: dict[tuple[int, int, int], float]


class Segmenter(nn.Module):
    """Pixels B×3×H×W → class logits B×K×H×W, in terms that can be traced for every H and W.

    Args:
        model: a segmenter; it is copied.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = copy.deepcopy(model).float().cpu().eval()
        own = isinstance(model, GKDStudentForSemanticSegmentation)
        self.padded_size = self.model.student.adapter.padded_size if own else None
        for module in self.model.modules():
            if isinstance(module, nn.AdaptiveAvgPool2d):
                # PyTorch's is exported with the windows of the traced size. UperNet keeps its pools in a plain list
                # as well, so that another module in this one's place would not be called.
                module.forward = partial(_adaptive_average, output_size=module.output_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = rows, columns = pixel_values.shape[-2:]
        if self.padded_size is not None:
            # A GKD segmenter pads only if it has to; a graph has no such branch, so it pads by 0 then.
            rows, columns = self.padded_size(height, width)
            pixel_values = F.pad(pixel_values, (0, columns - width, 0, rows - height))
        return class_logits(self.model(pixel_values), (rows, columns))[..., :height, :width]


def _adaptive_average(maps: torch.Tensor, output_size: int | tuple[int, int]) -> torch.Tensor:
    """Adaptive average pooling of B×C×H×W as two matrix products, whose matrices follow the size."""
    rows, columns = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    return _windows(rows, maps.shape[-2], maps) @ maps @ _windows(columns, maps.shape[-1], maps).T


def _windows(count: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """count×size: row i averages positions ⌊i·size/count⌋ … ⌈(i+1)·size/count⌉−1."""
    window = torch.arange(count, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)[None]
    first, end = window * size // count, ((window + 1) * size + count - 1) // count
    return ((position >= first) & (position < end)).to(like.dtype) / (end - first).to(like.dtype)


def export_onnx(
    source: str | os.PathLike,
    file: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    size: tuple[int, int] | None = None,
    tolerance: float = TOLERANCE,
) -> OnnxExport:
    """Write ``pixel_values`` B×3×H×W → ``logits`` B×K×H×W as ONNX, and check it against PyTorch.

    The file is put in place only if onnxruntime gives the same logits for two batch sizes and two image sizes. Its
    metadata holds as JSON ``labels``, ``image_mean``, ``image_std``, ``image_size`` ([height, width] that the
    preprocessor makes) and ``stride`` (heights and widths have to be multiples of it; 1 for most models). Of
    Mask2Former's queries the logits are semantic inference's class scores.

    Args:
        source: folder or Hub id of a segmenter, see `gkd_hf.hub.native.load_segmenter`.
        file: where to write; default ``onnx/model.onnx`` in the segmenter's folder.
        size: (height, width): a graph for images of this one size, for models that cannot be traced for all.
        tolerance: largest absolute difference allowed.

    Raises:
        InputError: a package is missing, no segmenter there, not exportable, or logits that differ.
    """
    _require_packages()
    model = load_segmenter(source, revision=revision, trust_remote_code=trust_remote_code)
    if file is None and not os.path.isdir(source):
        raise InputError(f"'{source}' is not a folder: say with --out (file=) where to write the graph")
    file = Path(file) if file is not None else Path(source) / "onnx" / "model.onnx"
    mean, std = image_statistics(os.fspath(source), revision)

    @torch.no_grad()
    def reference(pixels: torch.Tensor) -> torch.Tensor:
        # Not `segmenter`, whose pools are our own: the model as everybody runs it.
        return class_logits(model(pixels), tuple(pixels.shape[-2:]))

    image_size = size or _processor_size(os.fspath(source), revision)
    other, stride = (size, 1) if size else _another_size(reference, image_size)
    segmenter = Segmenter(model)
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    metadata = {"labels": labels, "image_mean": mean, "image_std": std, "image_size": image_size, "stride": stride}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx.", dir=file.parent) as folder:
        written = Path(folder) / file.name
        opset = write_graph(segmenter, written, metadata, size)
        shapes = dict.fromkeys((batch, *shape) for shape in (image_size, other) for batch in (1, 2))
        differences = check_parity(written, reference, list(shapes), tolerance)
        os.replace(written, file)
    return OnnxExport(file, opset, labels, differences)


def write_graph(
    segmenter: Segmenter, file: str | os.PathLike, metadata: dict[str, object], size: tuple[int, int] | None = None
) -> int:
    """Trace ``segmenter`` into ``file`` and return the opset. ``size`` (height, width) fixes the image size.

    Raises:
        InputError: the model does something that cannot be traced.
    """
    axes = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    pixels = torch.zeros(2, 3, *(size or TRACED_SIZE))
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                segmenter,
                (pixels,),
                dynamo=True,
                dynamic_shapes={"pixel_values": axes},
                input_names=["pixel_values"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever a model raises in types of its own
        cause = error.__cause__ or error
        raise InputError(
            f"{type(segmenter.model).__name__} cannot be traced to ONNX{_advice(size)}: "
            f"{' '.join(str(cause).split())[:200]}"
        ) from error
    for key, value in metadata.items():
        program.model.metadata_props[key] = json.dumps(value)
    program.save(os.fspath(file))
    return program.model.opset_imports[""]


@torch.no_grad()
def check_parity(
    file: str | os.PathLike,
    reference: Callable[[torch.Tensor], torch.Tensor],
    shapes: list[tuple[int, int, int]],
    tolerance: float = TOLERANCE,
) -> dict[tuple[int, int, int], float]:
    """Run ``file`` in onnxruntime on random pixels and compare.

    Args:
        reference: pixels B×3×H×W → logits B×K×H×W. shapes: (batch, height, width) to try.

    Returns:
        The largest absolute difference at each shape.

    Raises:
        InputError: it cannot be run, or a difference is above ``tolerance`` (absolute).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised as well
    try:
        session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise InputError(f"onnxruntime cannot read the graph: {_first_line(error)}; nothing was written") from error
    fixed = isinstance(session.get_inputs()[0].shape[2], int)
    generator = torch.Generator().manual_seed(0)
    differences = {}
    for batch, height, width in shapes:
        pixels = torch.randn(batch, 3, height, width, generator=generator)
        where = f"for {batch} image{'s' if batch > 1 else ''} of {height}×{width}"
        expected = reference(pixels).numpy()
        try:
            (got,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
        except Exception as error:
            raise InputError(
                f"the ONNX graph does not run {where}{_advice(fixed)}; nothing was written ({_first_line(error)})"
            ) from error
        if got.shape != expected.shape:
            raise InputError(
                f"the ONNX graph gives logits {got.shape} {where}, PyTorch {expected.shape}{_advice(fixed)}; nothing "
                "was written"
            )
        difference = float(np.abs(got - expected).max())
        if not difference <= tolerance:
            raise InputError(
                f"the ONNX graph does not give PyTorch's logits {where}: they differ by {difference:.3g} (largest "
                f"logit {np.abs(expected).max():.3g}), allowed is {tolerance:.3g}{_advice(fixed)}; nothing was written"
            )
        differences[batch, height, width] = difference
    return differences


def onnx_usage(file: str | os.PathLike = "onnx/model.onnx") -> str:
    """Python that segments ``street.jpg`` with the graph, for a card: needs numpy, pillow and onnxruntime."""
    return f"""\
import json
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{Path(file).as_posix()}")
about = {{key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}}
image = Image.open("street.jpg").convert("RGB").resize(about["image_size"][::-1], Image.Resampling.BILINEAR)
pixels = (np.asarray(image) / 255 - about["image_mean"]) / about["image_std"]
(logits,) = session.run(["logits"], {{"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)}})
for index, count in zip(*np.unique(logits[0].argmax(0), return_counts=True)):
    print(f"{{about['labels'][index]}}: {{100 * count / logits[0, 0].size:.1f}} %")
"""


def _another_size(
    reference: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, int]
) -> tuple[tuple[int, int], int]:
    """A second (height, width) that the model takes, and what sizes are multiples of if these two stand for all."""
    height, width = size
    multiple = math.gcd(height, width)
    candidates = [
        ((height + 37, width + 91), 1),
        ((2 * height, 3 * width), multiple),
        ((2 * height, 2 * width), multiple),
    ]
    for candidate, stride in candidates:
        try:
            reference(torch.zeros(1, 3, *candidate))
        except (RuntimeError, ValueError):
            continue  # some of transformers' models take whole windows only, or squares
        return candidate, stride
    raise InputError(f"the model takes no other images than {height}×{width}: --size {height}x{width}")


def _processor_size(source: str, revision: str | None) -> tuple[int, int]:
    """(height, width) that the preprocessor makes of every image; the traced size where it does not say."""
    folder = source if os.path.isdir(source) else pull(source, CONFIGURATION, revision=revision)
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    except OSError:
        return TRACED_SIZE
    size = settings.get("size") or {}
    if isinstance(size, int):
        return size, size
    side = size.get("shortest_edge")
    return size.get("height") or side or TRACED_SIZE[0], size.get("width") or side or TRACED_SIZE[1]


def _advice(size: object) -> str:
    return "" if size else " (a graph for one image size may work: --size HEIGHTxWIDTH)"


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"exporting to ONNX needs {', '.join(missing)}: pip install {' '.join(PACKAGES)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the exporter says about operators of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]
