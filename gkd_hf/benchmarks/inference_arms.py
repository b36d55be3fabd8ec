"""One segmenter's ways of being run: as it is, compiled by torch, and as an ONNX graph in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from gkd_hf.errors import InputError
from gkd_hf.hub.onnx import PACKAGES, Segmenter, write_graph
from gkd_hf.hub.segmenters import class_scores, load_segmenter
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel

Forward = Callable[[torch.Tensor], torch.Tensor]

# Encoders with random weights, by the size that they have in papers.
PRESETS: dict[str, dict[str, Any]] = {
    "vit-s": {
        "model_type": "vit",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "image_size": 224,
        "patch_size": 16,
    },
    "resnet-50": {"model_type": "resnet"},
}


def build(model: str, head: str | None, classes: int, window: int) -> PreTrainedModel:
    """Return a segmenter in eval mode.

    Args:
        model: a name of `PRESETS` for random weights, or a Hub id or folder of a segmenter.
        head: decode head of a preset; None is "linear". classes: of a preset.
        window: side of the square images in pixels that positions are resampled to.

    Raises:
        InputError: nothing readable there, an unknown head, or a head for a segmenter that has its own.
    """
    if model not in PRESETS:
        if head is not None:
            raise InputError(f"'{model}' comes with a decode head of its own: leave --head {head} out")
        return load_segmenter(model)
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(PRESETS[model], image_size=window)
    return GKDStudentForSemanticSegmentation.from_student(
        student, num_labels=classes, decode_head=head or "linear"
    ).eval()


class Scores(nn.Module):
    """Pixels n×3×H×W → class scores n×C×h×w at the resolution that the segmenter gives them in.

    Args:
        model: the segmenter. precision: "fp32", or "bf16" for autocast.
    """

    def __init__(self, model: PreTrainedModel, precision: str):
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return class_scores(self.model(pixel_values=pixels))


def compiled(scores: Scores, pixels: torch.Tensor) -> Forward:
    """Compile a segmenter with inductor, and run it once on n×3×H×W ``pixels``.

    Raises:
        InputError: it cannot be compiled here, for example because there is no C++ compiler.
    """
    model = scores.model
    if isinstance(model, GKDStudentForSemanticSegmentation):
        # An encoder's first call sets up how it tells its hidden states, which would break the graph.
        maybe_install_capturing_hooks(model.student.encoder)
    forward = torch.compile(scores, dynamic=False)
    try:
        with torch.no_grad():
            forward(pixels)
    except Exception as error:  # dynamo, inductor and the compilers behind them raise types of their own
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise InputError(f"torch.compile failed: {type(error).__name__}: {lines[0][:150] if lines else ''}") from error
    return forward


def onnx_session(model: PreTrainedModel, folder: Path, window: int, device: torch.device) -> Forward:
    """Export a segmenter to ``folder``; return what ONNX Runtime scores n×3×window×window pixels with.

    Raises:
        InputError: a package is missing, there is no ONNX Runtime for the device, or the model cannot be exported.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing: pip install {' '.join(missing)}")
    import onnxruntime

    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise InputError(f"this onnxruntime has no {provider}: pip install onnxruntime-gpu in its place")
    file = folder / "model.onnx"
    write_graph(Segmenter(model), file, {}, (window, window))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait busily would slow down the arm that comes next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=[provider])

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"pixel_values": pixels.cpu().numpy()})
        return torch.from_numpy(logits).to(pixels.device)

    return forward


def forwards(
    model: PreTrainedModel, precision: str, window: int, pixels: torch.Tensor, folder: Path
) -> tuple[dict[str, Forward], dict[str, str]]:
    """Return the ways to score windows that are possible here, and why the others are not.

    Args:
        model: the segmenter, on the device of ``pixels``. precision: of torch's arms; the graph is in fp32.
        pixels: n×3×window×window, a batch of windows, to compile for. folder: where the graph is written.
    """
    scores = Scores(model, precision)
    ways: dict[str, Forward] = {"eager": scores}
    skipped: dict[str, str] = {}
    makers: dict[str, Callable[[], Forward]] = {
        "compiled": lambda: compiled(scores, pixels),
        "onnx": lambda: onnx_session(model, folder, window, pixels.device),
    }
    for name, make in makers.items():
        try:
            ways[name] = make()
        except InputError as error:
            skipped[name] = str(error)
    return ways, skipped
