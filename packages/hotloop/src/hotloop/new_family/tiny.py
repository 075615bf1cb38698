"""A small model of any model type that transformers has, to look into."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large, so that attention is far from uniform and a wrong rotation shows
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
OPTIONAL: dict[str, Any] = {"sliding_window": 9, "query_pre_attn_scalar": 5}
"""Set only where the default config gives them a value."""
HEAD_DIMS = (32, 16)
"""Another head size than hidden_size / heads, where the model can have one."""
SOFTCAP = 2.0
MOST_LAYERS = 8
NORM_STD, BIAS_STD = 0.1, 0.01
LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Keyword arguments of `config_class` that make a model of a few thousand weights."""

    config_class: type[PreTrainedConfig]
    arguments: dict[str, Any]

    def config(self, changes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
        """A new config, with some arguments changed."""
        return self.config_class(**{**self.arguments, **(changes or {})})


def tiny(model_type: str) -> Tiny:
    """Sizes for a small model that has every kind of layer of its type, and multipliers that are not one.

    Raises:
        UnsupportedError: transformers does not know the type, or it is no decoder of text alone.
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
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    parts = {
        name: getattr(default, name).model_type
        for name in default.sub_configs
        if hasattr(getattr(default, name, None), "model_type")
    }
    if parts:
        inside = ", ".join(f"{name} is {kind!r}" for name, kind in parts.items())
        raise UnsupportedError(
            f"model_type={model_type!r} is made of several models ({inside}); a family describes one decoder of text. "
            "Describe its text model."
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(
            f"model_type={model_type!r} has no ...ForCausalLM in transformers, so it has no loss over next tokens."
        )
    experts = sorted(key for key in default.to_dict() if "expert" in key)
    if experts:
        raise UnsupportedError(
            f"model_type={model_type!r} routes tokens to experts ({', '.join(experts)}); guessing is for dense layers."
        )
    small = Tiny(config_class=config_class, arguments=_arguments(config_class, default))
    if "head_dim" not in default.to_dict():
        return small
    for head_dim in HEAD_DIMS:
        made = replace(small, arguments={**small.arguments, "head_dim": head_dim})
        if _runs(made):
            return made
    return small


def _runs(small: Tiny) -> bool:
    model = build(small.config())
    try:
        with torch.no_grad():
            model(input_ids=tokens(model.config), use_cache=False)
    except RuntimeError:  # shapes that do not fit
        return False
    return True


def _arguments(config_class: type[PreTrainedConfig], default: PreTrainedConfig) -> dict[str, Any]:
    values = default.to_dict()
    arguments = {key: value for key, value in SIZES.items() if hasattr(default, key)}
    arguments |= {key: value for key, value in OPTIONAL.items() if values.get(key) is not None}
    for number, key in enumerate(multipliers(values), start=3):
        arguments[key] = (
            number / 10 + 0.01
        )  # a value of its own, that can be recognised where it works
    arguments |= {
        key: 0.0 for key, value in values.items() if ("dropout" in key or "pdrop" in key) and value
    }
    caps: dict[str, Any] = {
        key: SOFTCAP for key in values if "softcap" in key and values[key] is not None
    }
    wanted = _kinds(default)
    for layers in range(2, MOST_LAYERS + 1):
        arguments["num_hidden_layers"] = layers
        if _kinds(config_class(**arguments, **caps)) == wanted:
            break
    return arguments | caps


def multipliers(values: dict[str, Any]) -> list[str]:
    """The keys of a config that look like factors."""
    words = ("multiplier", "scaling", "logit_scale", "residual_scale")
    return sorted(
        key
        for key, value in values.items()
        if isinstance(value, float) and any(word in key for word in words)
    )


def _kinds(config: PreTrainedConfig) -> set[str]:
    """What its lists with one entry per layer hold, by key."""
    layers = config.num_hidden_layers
    return {
        f"{key}={entry}"
        for key, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == layers
        for entry in value
    }


def build(config: PreTrainedConfig) -> Any:
    """The ...ForCausalLM of a config in fp32, eager attention, with norms and biases that are not all one or zero."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                std = BIAS_STD if name.endswith("bias") else NORM_STD
                parameter.data += std * torch.randn_like(parameter)
    return model.float().eval()


def tokens(config: PreTrainedConfig) -> torch.Tensor:
    """Token ids [2, 40]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, config.vocab_size, (2, LENGTH), generator=generator)
