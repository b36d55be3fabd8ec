"""Where an encoder comes from: a Hub id, a folder, a configuration. Safetensors only, and never half-loaded."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging as transformers_logging

from .encoders import adapter_for
from .errors import InputError, nearest

MINIMUM_COVERAGE = 0.95  # of the encoder's tensors that a checkpoint must hold


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
        revision: the commit, tag or branch of a Hub id.

    Raises:
        InputError: unknown architecture, nothing at that place, or weights for less than 95 % of the tensors.
    """
    if isinstance(source, PreTrainedConfig | dict):
        config = source if isinstance(source, PreTrainedConfig) else config_from_mapping(source)
        return adapter_for(config).build().float(), tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
    source = os.fspath(source)
    config = _config_of(source, revision)
    adapter = adapter_for(config)
    if adapter.norm_epsilon is not None:
        config.layer_norm_eps = adapter.norm_epsilon
    mean, std = image_statistics(source, revision)
    if not pretrained:
        return adapter.build().float(), mean, std
    with _quiet_loading():
        try:
            encoder, report = adapter.model_class.from_pretrained(
                source,
                config=config,
                revision=revision or "main",
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **adapter.constructor,
            )
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read safetensors weights of '{source}': {_first_line(error)}") from error
    _check_coverage(source, encoder, report)
    reference = adapter.build() if not adapter.native_mask else None
    if reference is not None:
        # from_pretrained goes around build(); carry over what build() corrects and no configuration stores.
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
    try:
        config = AutoConfig.for_model(kind)
    except ValueError as error:
        raise InputError(f"unknown encoder model_type '{kind}': no such transformers model") from error
    epsilon = adapter_for(config).norm_epsilon
    known = set(config.to_dict())
    for name in fields:
        if name not in known:
            raise InputError(f"{kind} has no configuration field '{name}'{nearest(name, known)}")
    try:
        defaults = {} if epsilon is None else {"layer_norm_eps": epsilon}
        return AutoConfig.for_model(kind, **(defaults | fields))
    except Exception as error:  # the strict configuration classes raise their own type
        raise InputError(f"bad {kind} configuration: {_first_line(error)}") from error


def image_statistics(source: str, revision: str | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the image mean and standard deviation in the preprocessor configuration, or ImageNet's if it has none."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision or "main")
    except OSError as error:
        if os.path.isfile(os.path.join(source, "preprocessor_config.json")):
            raise InputError(f"cannot read '{source}/preprocessor_config.json': {_first_line(error)}") from error
        settings = {}
    return tuple(
        _three_numbers(source, key, settings.get(key, default))
        for key, default in (("image_mean", IMAGENET_DEFAULT_MEAN), ("image_std", IMAGENET_DEFAULT_STD))
    )


def _three_numbers(source: str, key: str, values: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or (key == "image_std" and min(numbers) <= 0):
        raise InputError(f"'{source}/preprocessor_config.json': {key} is {values!r}, three numbers (RGB) are needed")
    return numbers


def _config_of(source: str, revision: str | None) -> PreTrainedConfig:
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not os.path.isdir(source):
        raise InputError(f"no encoder at '{source}': that folder does not exist (give a folder or a Hub id org/name)")
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise InputError(f"no encoder at '{source}': the folder has no config.json")
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the configuration of encoder '{source}': {_first_line(error)}") from error


def _check_coverage(source: str, encoder: PreTrainedModel, report: dict[str, Any]) -> None:
    # The mask token is new by design, and a batch counter is not knowledge.
    wanted = {k for k in encoder.state_dict() if not k.endswith(("mask_token", "num_batches_tracked"))}
    missing = {key for key in report["missing_keys"] if key in wanted}
    missing |= {entry[0] for entry in report["mismatched_keys"] if entry[0] in wanted}
    coverage = 1 - len(missing) / len(wanted)
    if coverage < MINIMUM_COVERAGE:
        examples = ", ".join(sorted(missing)[:3])
        raise InputError(
            f"the weights of '{source}' fill only {coverage:.0%} of the {len(wanted)} tensors of "
            f"{type(encoder).__name__} (missing or of another shape: {examples}, …); is the checkpoint of another "
            "architecture?"
        )


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
