"""The hyperparameters of a GGUF file, from a model's facts and what its family says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotloop_core import ExportFacts, ExportRequest, ModelFacts

    from .writer import Value

_WINDOW = "attention.sliding_window"
_WITHOUT_WINDOW = {"phi3"}
"""Architectures whose window llama.cpp reads and leaves at that."""
_WITH_DIVISORS = {"llama", "granite", "exaone4"}
"""Architectures for which it reads `rope_freqs`."""
_WITH_LONGROPE = {"phi3"}
"""Architectures for which it reads `rope_factors_long` and `rope_factors_short`."""
_ASSUMED = {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}
"""What llama.cpp takes where a file lacks a key, for keys whose absence would have to mean "none"."""
_FLOATS = {
    *(
        "attention.scale",
        "embedding_scale",
        "residual_scale",
        "logit_scale",
        "expert_weights_scale",
    ),
    *("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"),
    *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.clamp_kqv"),
    *("rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "rope.scaling.attn_factor"),
}
"""Keys that llama.cpp reads as float32 and as nothing else: a config may say 12 for 12.0."""


def general(request: ExportRequest, facts: ExportFacts, file_type: int) -> dict[str, Value]:
    """The `general.*` keys. file_type: llama.cpp's number for the mix of storage types."""
    keys: dict[str, Value] = {
        "general.architecture": facts.architecture,
        "general.type": "model",
        "general.name": request.name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
    }
    licence = request.metadata.get("license")
    if isinstance(licence, str):
        keys["general.license"] = licence
    return keys


def hyperparameters(model: ModelFacts, facts: ExportFacts) -> dict[str, Value]:
    """Sizes, rope and the family's own keys, under the architecture's prefix.

    Raises:
        UnsupportedError: the model does something that the architecture has no key for.

    """
    _refuse_inexpressible(model, facts)
    keys: dict[str, Value] = {
        "block_count": model.layers,
        "context_length": model.max_positions,
        "embedding_length": model.hidden_size,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        **_epsilon(model, facts),
        "rope.freq_base": _rope(model)["rope_theta"],
        **_rope_scaling(model, facts),
    }
    for key, source in facts.metadata.items():
        value = _read(model, source) if isinstance(source, str) else source
        if value is not None:
            keys[key] = float(value) if key in _FLOATS else value
        elif f"{facts.architecture}.{key}" in _ASSUMED:
            raise UnsupportedError(
                f"the model has no {source}, and llama.cpp takes {_ASSUMED[f'{facts.architecture}.{key}']} "
                f"where a {facts.architecture!r} file has no {key!r}. Export as safetensors."
            )
    return {f"{facts.architecture}.{key}": value for key, value in keys.items()}


def notes(model: ModelFacts, facts: ExportFacts) -> list[str]:
    """What readers of the file compute otherwise, within what the architecture can say."""
    window = model.window
    found: list[str] = []
    heeded = _WINDOW in facts.metadata and facts.architecture not in _WITHOUT_WINDOW
    if window is not None and window < model.max_positions and not heeded:
        count = sum(model.windowed)
        found.append(
            f"{count} of {model.layers} layers see only the last {window:,} tokens; of files of the architecture "
            f"{facts.architecture!r} llama.cpp reads no window and lets them see everything: in "
            f"texts longer than {window:,} tokens it computes something else"
        )
    rope = _rope(model)
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        found.append(
            f"the rope has factors for up to {original:,} tokens and others beyond; transformers chooses by the text's "
            "length, llama.cpp by the context that it is opened with: open it with at most "
            f"{original:,} for texts that fit"
        )
    return found


def rope_factors(model: ModelFacts) -> dict[str, list[float]]:
    """Tensor name -> divisors of the rotary_dim / 2 rope frequencies; empty where all are 1."""
    rope = _rope(model)
    match rope["rope_type"]:
        case "llama3":
            return {"rope_freqs.weight": _llama3_factors(model, rope)}
        case "longrope":
            return {
                f"rope_factors_{length}.weight": [
                    float(factor) for factor in rope[f"{length}_factor"]
                ]
                for length in ("long", "short")
            }
        case _:
            return {}


def _llama3_factors(model: ModelFacts, rope: Mapping[str, Any]) -> list[float]:
    """Llama 3.1's rule, as transformers' `_compute_llama3_parameters` computes it: short wavelengths
    are kept, long ones divided by `factor`, and between them the frequency is interpolated.
    """
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    factors: list[float] = []
    for i in range(0, model.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / model.head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(float(factor))
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


def _rope_scaling(model: ModelFacts, facts: ExportFacts) -> dict[str, Value]:
    rope = _rope(model)
    match rope["rope_type"]:
        case "default":
            return {}
        case "llama3" if facts.architecture in _WITH_DIVISORS:
            return {}  # the divisors are a tensor
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        case "yarn":
            return _yarn(model, rope)
        case "longrope" if facts.architecture in _WITH_LONGROPE:
            return _longrope(model, rope)
        case "dynamic":
            # transformers rescales only beyond max_position_embeddings, which is written as the
            # context length: within it this is the unscaled rope, exactly.
            return {}
        case other:
            raise UnsupportedError(
                f"rope type {other!r} is not written to GGUF for the architecture {facts.architecture!r}; default, "
                f"linear, dynamic and yarn are for all, llama3 for {', '.join(sorted(_WITH_DIVISORS))}, longrope for "
                f"{', '.join(sorted(_WITH_LONGROPE))}. Export as safetensors."
            )


def _yarn(model: ModelFacts, rope: Mapping[str, Any]) -> dict[str, Value]:
    shape = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True))
    if shape != (32, 1, True):
        raise UnsupportedError(
            f"rope type 'yarn' with beta_fast, beta_slow, truncate = {shape}: llama.cpp computes most "
            "architectures with (32, 1, True) whatever the file says. Export as safetensors."
        )
    factor = float(rope["factor"])
    original = rope.get("original_max_position_embeddings") or model.max_positions
    keys: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original),
    }
    # llama.cpp applies 1 + 0.1 ln(factor) itself; the key multiplies that.
    ratio = _yarn_attention(rope, factor) / (1.0 + 0.1 * math.log(factor))
    if not math.isclose(ratio, 1.0, rel_tol=1e-6):
        keys["rope.scaling.attn_factor"] = ratio
    return keys


def _longrope(model: ModelFacts, rope: Mapping[str, Any]) -> dict[str, Value]:
    """The factors themselves are tensors. `rope.scaling.factor` stays away: it would divide every position."""
    original = rope["original_max_position_embeddings"]
    scale = rope.get("factor") or model.max_positions / original
    attention = rope.get("attention_factor")
    if attention is None:  # arXiv:2402.13753 appendix; transformers' `_compute_longrope_parameters`
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": int(original),
        "rope.scaling.attn_factor": float(attention),
    }


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """The factor on cos and sin, as transformers' `_compute_yarn_parameters` computes it."""

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _epsilon(model: ModelFacts, facts: ExportFacts) -> dict[str, Value]:
    """Of RMS norms, unless the family names another key for it."""
    if "norm_eps" in facts.metadata.values():
        return {}
    return {"attention.layer_norm_rms_epsilon": model.norm_eps}


def _rope(model: ModelFacts) -> Mapping[str, Any]:
    """The rope of the full-attention layers; a family names further ones in its metadata."""
    return model.rope.get("full_attention", model.rope)


def _refuse_inexpressible(model: ModelFacts, facts: ExportFacts) -> None:
    local = model.rope.get("sliding_attention", {}).get("rope_type", "default")
    if local != "default":
        raise UnsupportedError(
            f"rope type {local!r} in the windowed layers is not written to GGUF: llama.cpp scales the rope of the "
            "others alone. Export as safetensors."
        )
    named = {source for source in facts.metadata.values() if isinstance(source, str)}
    taken = {
        "activation": None if "mlp" in model.own else "silu",
        "attention_softcap": None,
        "logit_softcap": None,
        "logit_divisor": 1.0,
        "residual_scale": 1.0,
        "attention_scale": model.head_dim**-0.5,
        "rotary_dim": model.head_dim,
        "window_rope_theta": float(_rope(model)["rope_theta"]),
    } | {field: implied(model) for field, implied in facts.implied.items()}
    for field, usual in taken.items():
        value = _read(model, field)
        if value != usual and field not in named:
            raise UnsupportedError(
                f"the model has {field}={value}, for which the family's GGUF architecture "
                f"{facts.architecture!r} names no key: llama.cpp takes {usual} and would compute "
                "something else. Export as safetensors, or name the key in the family's "
                "ExportFacts.metadata."
            )


def _read(model: ModelFacts, source: str) -> Any:
    """A field of the facts, or with "config." before it a key of the model's config."""
    name = source.removeprefix("config.")
    value = model.config.get(name) if name != source else getattr(model, source, None)
    if name == source and not hasattr(model, source):
        raise UnsupportedError(
            f"the family's ExportFacts.metadata names {source!r}, which is no field of ModelFacts; "
            "for a key of config.json write 'config.NAME'"
        )
    return value
