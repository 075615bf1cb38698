"""A small model of any model type that transformers has, to look into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .kinds import check_layers, decoder_config, own_code, without_memory

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
    "rotary_dim": 8,
    "initializer_range": 0.2,  # large, so that attention is far from uniform and a wrong rotation shows
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
OPTIONAL: dict[str, Any] = {
    "sliding_window": 9,
    "max_window_layers": 1,
    "query_pre_attn_scalar": 5,
    "clip_qkv": 0.1,
}
"""Set only where the default config gives them a value; tried where it gives none."""
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon")
"""The names that configs have for the epsilon of their norms."""
HEAD_DIMS = (32, 16)
"""Another head size than hidden_size / heads, where the model can have one."""
SOFTCAP = 2.0
NORM_EPS = 1e-3
"""So large that a norm with another epsilon than the config's shows."""
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
        UnsupportedError: transformers does not know the type, or it is no dense decoder of text alone, with layers of
            one kind.
    """
    default = decoder_config(model_type)
    whole = without_memory(default)
    if whole is not None:
        check_layers(model_type, whole)
    with own_code(
        f"model_type={model_type!r}: its config does not take the sizes of a small model"
    ):
        small = Tiny(config_class=type(default), arguments=_arguments(type(default), default))
    for head_dim in HEAD_DIMS if "head_dim" in default.to_dict() else ():
        made = replace(small, arguments={**small.arguments, "head_dim": head_dim})
        if _runs(made):
            small = made
            break
    if whole is None:  # the type's own defaults make no model
        with own_code(f"model_type={model_type!r}: its model cannot be built"):
            check_layers(model_type, build(small.config()))
    return small


def _runs(small: Tiny) -> bool:
    try:
        model = build(small.config())
        with torch.no_grad():
            model(input_ids=tokens(model.config), use_cache=False)
    except Exception:  # whatever the model's own code raises about sizes that do not fit
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
    arguments |= {key: NORM_EPS for key in EPSILONS if key in values}
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
