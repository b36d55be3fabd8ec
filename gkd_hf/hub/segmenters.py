"""Segmenters as they lie in a folder or on the Hub: how any of them is loaded, and its class scores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
)
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

from gkd_hf.errors import InputError
from gkd_hf.models.configuration_gkd import GKDStudentConfig
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation
from gkd_hf.models.pull import CONFIGURATION, WEIGHTS, pull


def load_segmenter(
    source: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a segmenter that was exported or pushed: one of transformers' own classes, or a GKD segmenter.

    Args:
        source: a folder or a Hub id. revision: commit, tag or branch of a Hub id.
        trust_remote_code: run the code of a repository that is neither; GKD segmenters do not need it here.

    Raises:
        InputError: nothing readable there or no access to it, not a segmenter, weights missing or not in safetensors,
            or its code would have to be run without the flag.
    """
    source = os.fspath(source)
    with quiet():
        try:
            folder = folder_of(source, revision, CONFIGURATION)
            fields, _ = PreTrainedConfig.get_config_dict(folder)
            kind, settings = _class_for(source, folder, fields, trust_remote_code)
            if not os.path.isdir(source):
                # The commit of the configuration, even if the branch has moved on since.
                patterns = (*CONFIGURATION, *WEIGHTS, *(("*.py",) if settings else ()))
                folder = pull(source, patterns, revision=folder.name)
            model, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **settings)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"cannot read a segmenter from '{source}': {reason}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"the weights of '{source}' lack {len(missing)} tensors of the segmenter ({missing[0]}, …)")
    model.name_or_path = model.config.name_or_path = source
    return model.eval()


def folder_of(source: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """``source`` itself if it is a folder, else the cache's with these files of a Hub id; raises `InputError`."""
    if os.path.isdir(source):
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(
            f"no segmenter at '{source}': that folder does not exist (give a folder or a Hub id org/name)"
        )
    return pull(source, patterns, revision=revision)


def _class_for(
    source: str, folder: Path, fields: dict[str, Any], trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """The class, or Auto class, that loads a segmenter of this configuration, and what it has to be told."""
    if fields.get("model_type") == GKDStudentConfig.model_type:
        if not fields.get("decode_head"):
            raise InputError(f"'{source}' is a student without a decode head, not a segmenter")
        return GKDStudentForSemanticSegmentation, {}
    foreign = "auto_map" in fields
    if foreign and not trust_remote_code:
        raise InputError(
            f"'{source}' comes with code of its own, which would run on this machine: read it, then allow it with "
            "trust_remote_code (on the command line --trust-remote-code)"
        )
    if foreign:
        return AutoModelForSemanticSegmentation, {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder)
    if type(config) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING:
        return AutoModelForUniversalSegmentation, {}
    if type(config) in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        return AutoModelForSemanticSegmentation, {}
    raise InputError(f"'{source}' is a {config.model_type}, which is no semantic segmenter in transformers")


def class_scores(outputs: ModelOutput) -> torch.Tensor:
    """Return float32 B×K×h×w class scores of a semantic segmenter's or Mask2Former's outputs, at their resolution.

    Of Mask2Former's queries, as its semantic inference has it: Σ_q softmax(class)[:-1] · sigmoid(mask).
    """
    if "class_queries_logits" in outputs:
        classes = outputs["class_queries_logits"].float().softmax(-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", classes, outputs["masks_queries_logits"].float().sigmoid())
    return outputs["logits"].float()


def class_logits(outputs: ModelOutput, size: tuple[int, int]) -> torch.Tensor:
    """Return `class_scores` resized bilinearly to ``size`` (H, W), float32 B×K×H×W."""
    logits = class_scores(outputs)
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from telling about the loading, and that Mask2Former was first trained with Swin only."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
