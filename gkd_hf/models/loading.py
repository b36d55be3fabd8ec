"""Where an encoder comes from: a Hub id, a folder, a configuration.

Safetensors only, never half-loaded, and never with code that comes with the weights.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging as transformers_logging

from .encoder_adapter import EncoderAdapter
from .encoders import adapter_class, adapter_for, check_installed, vision_tower
from .errors import InputError, nearest
from .pull import CONFIGURATION, PICKLES, WEIGHTS, listed_files, pull

IMAGENET_MEAN, IMAGENET_STD = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)


def load_encoder(
    source: str | os.PathLike | PreTrainedConfig | dict[str, Any],
    *,
    pretrained: bool = True,
    revision: str | None = None,
) -> tuple[PreTrainedModel, tuple[float, ...], tuple[float, ...]]:
    """Return an encoder in fp32 and the mean and standard deviation (RGB, of [0, 1] pixels) it was trained with.

    Args:
        source: a Hub id, a folder, a configuration, or a mapping with ``model_type`` and the configuration's fields.
        pretrained: read the weights (ids and folders only); False gives random weights in that architecture.
        revision: the commit, tag or branch of a Hub id; which commit it stood for: `pull.pulled_commit`.

    Raises:
        InputError: nothing at that place or no access to it, unknown architecture or one that brings its own code, no
            weights in safetensors, weights of another patch or image size than the configuration says, or that lack
            a tensor of the encoder.
    """
    if isinstance(source, PreTrainedConfig | dict):
        # A model keeps its configuration and writes into it: the caller's stays as it is.
        config = copy.deepcopy(source) if isinstance(source, PreTrainedConfig) else config_from_mapping(source)
        adapter = adapter_for(config)
        mean, std = adapter.pixel_statistics or (IMAGENET_MEAN, IMAGENET_STD)
        return adapter.build().float(), mean, std
    source = os.fspath(source)
    folder = _folder_of(source, revision)
    adapter = adapter_for(read_config(folder, source))
    if adapter.norm_epsilon is not None:
        adapter.adjust(layer_norm_eps=adapter.norm_epsilon)
    mean, std = adapter.pixel_statistics or _image_statistics(folder, source)
    if not pretrained:
        return adapter.build().float(), mean, std
    if not os.path.isdir(source):
        # The commit of the configuration, even if the branch has moved on since.
        folder = pull(source, (*CONFIGURATION, *WEIGHTS), revision=folder.name)
    _check_format(source, folder)
    with _quiet_loading():
        try:
            encoder, report = adapter.model_class.from_pretrained(
                folder,
                config=adapter.config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **adapter.constructor,
            )
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read safetensors weights of '{source}': {_first_line(error)}") from error
    # Not the folder in the cache: where it is on this machine means nothing elsewhere.
    encoder.name_or_path = encoder.config.name_or_path = source
    _check_shapes(source, adapter, report)
    _check_coverage(source, encoder, adapter, report)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules()):
        # from_pretrained goes around build(); carry over what build() corrects and no configuration stores.
        with torch.device("meta"):
            reference = adapter.build()
        for module, corrected in zip(encoder.modules(), reference.modules(), strict=True):
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = corrected.momentum
    return encoder, mean, std


def config_from_mapping(fields: dict[str, Any]) -> PreTrainedConfig:
    """Build an encoder configuration from its fields; raise `InputError` for an unknown type, field or value."""
    fields = dict(fields)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise InputError("an encoder given by its fields needs 'model_type', for example model_type: resnet")
    check_installed(kind)
    try:
        config = AutoConfig.for_model(kind)
    except ValueError as error:
        raise InputError(f"unknown encoder model_type '{kind}': no such transformers model") from error
    epsilon = adapter_class(kind).norm_epsilon
    known = set(config.to_dict())
    for name in fields:
        if name not in known:
            raise InputError(f"{kind} has no configuration field '{name}'{nearest(name, known)}")
    try:
        defaults = {} if epsilon is None else {"layer_norm_eps": epsilon}
        return AutoConfig.for_model(kind, **(defaults | fields))
    except Exception as error:  # the strict configuration classes raise their own type
        raise InputError(f"bad {kind} configuration: {_one_line(error)}") from error


def image_statistics(source: str, revision: str | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the image mean and standard deviation that a folder or Hub id states, or ImageNet's if it states none."""
    return _image_statistics(_folder_of(source, revision), source)


def _image_statistics(folder: Path, source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    settings = {}
    if (folder / "preprocessor_config.json").is_file():
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
        except OSError as error:
            raise InputError(f"cannot read '{source}/preprocessor_config.json': {_first_line(error)}") from error
    elif (folder / "config.json").is_file():
        trained = _read_fields(folder, source).get("pretrained_cfg") or {}  # where timm's repos have them
        settings = {f"image_{key}": trained[key] for key in ("mean", "std") if key in trained}
    return tuple(
        _three_numbers(source, key, settings.get(key, default))
        for key, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD))
    )


def read_config(folder: Path, source: str) -> PreTrainedConfig:
    """Return the configuration in a folder; code that comes with it is neither run nor asked about.

    A repo with code is read if transformers has the architecture itself, by transformers' own class. Of a model of
    images and text (CLIP, SigLIP) it is the vision tower's.

    Args:
        folder: where the files are. source: what they are called in messages.

    Raises:
        InputError: no or unreadable config.json, an unknown model type, or one that needs its own code.
    """
    fields = _read_fields(folder, source)
    # timm's repos name no type: transformers knows them by what they say of the weights.
    kind = fields.get("model_type", "timm_wrapper" if "pretrained_cfg" in fields else None)
    if not isinstance(kind, str):
        raise InputError(f"cannot read '{source}/config.json': it names no model_type, as transformers' models do")
    if kind not in CONFIG_MAPPING:
        if fields.get("auto_map"):
            raise InputError(
                f"'{source}' (model_type '{kind}') brings its own Python code. It is not run: teacher and student "
                "must be of an architecture that transformers itself has; choose such a repo, or convert the weights"
            )
        raise InputError(
            f"'{source}' is of model_type '{kind}', which transformers does not have{nearest(kind, CONFIG_MAPPING)} "
            "(code from elsewhere is not run: choose a repo whose architecture transformers itself has)"
        )
    check_installed(kind)
    try:
        config = vision_tower(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # the strict configuration classes raise their own type
        raise InputError(f"cannot read the configuration of encoder '{source}': {_one_line(error)}") from error
    vars(config).pop("auto_map", None)  # names code that is neither run nor saved with what is learned here
    return config


def _read_fields(folder: Path, source: str) -> dict[str, Any]:
    """Return what config.json says, nothing if that is no mapping."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no encoder at '{source}': it has no config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{source}/config.json': {_first_line(error)}") from error
    return fields if isinstance(fields, dict) else {}


def _three_numbers(source: str, key: str, values: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or (key == "image_std" and min(numbers) <= 0):
        raise InputError(f"'{source}/preprocessor_config.json': {key} is {values!r}, three numbers (RGB) are needed")
    return numbers


def _folder_of(source: str, revision: str | None) -> Path:
    """The folder with the configuration: the source itself, or where the cache holds it."""
    if os.path.isdir(source):
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"no encoder at '{source}': that folder does not exist (give a folder or a Hub id org/name)")
    return pull(source, CONFIGURATION, revision=revision)


def _check_format(source: str, folder: Path) -> None:
    """Refuse what is not in safetensors, before transformers looks for a converted copy of it."""
    if any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        return
    names = sorted(path.name for path in folder.iterdir())
    if not os.path.isdir(source):
        names = listed_files(source, folder.name) or names
    pickles = [name for name in names if name.endswith(PICKLES) and "training_args" not in name]
    if not pickles:
        raise InputError(f"'{source}' has no weights in safetensors (model.safetensors): it has {', '.join(names)}")
    raise InputError(
        f"'{source}' has its weights only as {pickles[0]}, a pickle, and reading a pickle can run any code in it. "
        "Choose a repo or revision with model.safetensors; or, if you trust its authors, convert it once: load it "
        "with transformers' from_pretrained(…, use_safetensors=False), save_pretrained(FOLDER), and give FOLDER"
    )


def _check_shapes(source: str, adapter: EncoderAdapter, report: dict[str, Any]) -> None:
    """Refuse weights whose patches or positions are not those of the configuration: they would be left out."""
    shapes = {name: tuple(shape) for name, shape, *_ in report["mismatched_keys"]}
    if adapter.kernel in shapes and shapes[adapter.kernel][0] == adapter.width:
        side = adapter.kernel_side(shapes[adapter.kernel])
        raise InputError(
            f"the weights of '{source}' have a patch size of {side}, its config.json says patch_size "
            f"{adapter.stride}: set it to {side} there (a recipe's patch_size resamples the weights)"
        )
    if adapter.positions in shapes and shapes[adapter.positions][-1] == adapter.width:
        side = round((shapes[adapter.positions][-2] - adapter.position_prefix) ** 0.5) * adapter.stride
        raise InputError(
            f"the weights of '{source}' have positions for images of {side}×{side} pixels, its config.json says "
            f"image_size {adapter.image_size}: set it to {side} there (a recipe's image_size resamples the weights)"
        )


def _check_coverage(source: str, encoder: PreTrainedModel, adapter: EncoderAdapter, report: dict[str, Any]) -> None:
    """Refuse weights that leave a tensor of the encoder as it was drawn: one random layer spoils all that follow."""
    wanted = {key for key in encoder.state_dict() if not key.endswith(adapter.optional)}
    missing = wanted & set(report["missing_keys"])
    reshaped = wanted & {entry[0] for entry in report["mismatched_keys"]}
    name = type(encoder).__name__
    if len(missing | reshaped) > len(wanted) / 2:
        raise InputError(
            f"the weights of '{source}' fill only {1 - len(missing | reshaped) / len(wanted):.0%} of the "
            f"{len(wanted)} tensors of {name} (missing or of another shape: {_some(missing | reshaped)}); is the "
            "checkpoint of another architecture?"
        )
    if reshaped:
        raise InputError(f"weights of '{source}' have another shape than its config.json says: {_some(reshaped)}")
    if missing:
        raise InputError(
            f"the weights of '{source}' lack {len(missing)} of the {len(wanted)} tensors of {name}, which would stay "
            f"random: {_some(missing)}; choose a checkpoint of the whole encoder"
            f"{adapter.incomplete and f' ({adapter.incomplete})'}"
        )


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")


@contextmanager
def _quiet_loading():
    """Silence the loading report: coverage is checked here, and a classifier's unused head is no news."""
    # With the first one silenced, the last would list every layer that tensor parallelism does not shard.
    names = (
        "transformers.modeling_utils",
        "transformers.utils.loading_report",
        "transformers.distributed.tensor_parallel",
    )
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    """All of a message, for those that name the field in the first line and the mistake in the next."""
    return " ".join(str(error).split())[:300]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
