"""Whether a model type is what a guess is for: a dense decoder of text whose layers are of one kind."""

from __future__ import annotations

import difflib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import HotloopError, UnsupportedError
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedConfig

BY_HAND = "Describe it by hand: docs/write-a-family.md"


def decoder_config(model_type: str) -> PreTrainedConfig:
    """The config of a model type as it is by default.

    Raises:
        UnsupportedError: transformers does not know the type, or it is not one decoder of text.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnsupportedError(
            f"transformers has no model_type={model_type!r}.{hint} A model whose code comes with its checkpoint needs "
            "a description by hand: docs/write-a-family.md"
        )
    with own_code(f"model_type={model_type!r}: its config cannot be made without arguments"):
        default = CONFIG_MAPPING[model_type]()
    parts = {
        name: getattr(getattr(default, name, None), "model_type", "")
        for name in default.sub_configs
    }
    inside = ", ".join(f"{name} is {kind!r}" for name, kind in parts.items() if kind)
    if inside:
        raise UnsupportedError(
            f"model_type={model_type!r} is made of several models ({inside}); a family describes one decoder of text. "
            "Describe its text model."
        )
    if getattr(default, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"model_type={model_type!r} is an encoder and a decoder; a family describes one decoder of text."
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(
            f"model_type={model_type!r} has no ...ForCausalLM in transformers, so it has no loss over next tokens."
        )
    return default


def without_memory(config: PreTrainedConfig) -> Any:
    """The whole model of a config, its weights on no device; None where transformers cannot build it.

    Raises:
        UnsupportedError: it cannot be built, and its config speaks of experts.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception:  # some types' defaults make no model
        experts = list(_experts(config.to_dict()))
        if experts:
            raise _routed(config.model_type, ", ".join(sorted(experts))) from None
        return None


def check_layers(model_type: str, model: Any) -> None:
    """Whether the layers of a model are dense, have attention of the usual kind, and hold the same modules.

    Raises:
        UnsupportedError: they are not.
    """
    for name, _ in model.named_modules():
        if "expert" in name:
            raise _routed(model_type, name)
    if getattr(model.config, "kv_lora_rank", None):
        raise UnsupportedError(
            f"model_type={model_type!r} has latent attention (kv_lora_rank); guessing is for q, k and v."
        )
    trees = [
        {path: type(module).__name__ for path, module in layer.named_modules() if path}
        for layer in model.get_submodule(layer_list(model))
    ]
    first = trees[0]
    for index, tree in enumerate(trees):
        other = next((p for p in {**first, **tree} if tree.get(p) != first.get(p)), None)
        if other is not None:
            raise UnsupportedError(
                f"model_type={model_type!r} has layers of several kinds: {other!r} is {first.get(other)} in layer 0 "
                f"and {tree.get(other)} in layer {index}; guessing is for layers of one kind."
            )


def layer_list(model: Any) -> str:
    """The path of the ModuleList with one entry per decoder layer.

    Raises:
        UnsupportedError: no such list was found.
    """
    layers = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and "." in name:
            return name
    raise UnsupportedError(
        f"model_type={model.config.model_type!r} has no ModuleList of its {layers} decoder layers, which a family "
        "describes."
    )


@contextmanager
def own_code(what: str) -> Iterator[None]:
    """Turns an error of a model's own code into a refusal that says what was tried.

    Raises:
        UnsupportedError: the code within raised anything.
    """
    try:
        yield
    except HotloopError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise UnsupportedError(f"{what} ({type(error).__name__}: {why}). {BY_HAND}") from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silences transformers' log below errors: what it warns of are the sizes of a model that nobody will use."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _experts(values: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a config, and of configs in it, that are about experts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _experts(value)
        elif "expert" in str(key):
            yield str(key)


def _routed(model_type: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"model_type={model_type!r} routes tokens to experts ({where}); guessing is for dense layers."
    )
