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
_ASSUMED = {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}
"""What llama.cpp takes where a file lacks a key, for keys whose absence would have to mean "none"."""


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
        "attention.layer_norm_rms_epsilon": model.norm_eps,
        "rope.freq_base": _rope(model)["rope_theta"],
        **_rope_scaling(model),
    }
    for key, source in facts.metadata.items():
        value = _read(model, source) if isinstance(source, str) else source
        if value is not None:
            keys[key] = value
        elif f"{facts.architecture}.{key}" in _ASSUMED:
            raise UnsupportedError(
                f"the model has no {source}, and llama.cpp takes {_ASSUMED[f'{facts.architecture}.{key}']} "
                f"where a {facts.architecture!r} file has no {key!r}. Export as safetensors."
            )
    return {f"{facts.architecture}.{key}": value for key, value in keys.items()}


def notes(model: ModelFacts, facts: ExportFacts) -> list[str]:
    """What readers of the file compute otherwise, within what the architecture can say."""
    window = model.window
    if window is None or window >= model.max_positions or _WINDOW in facts.metadata:
        return []
    count = sum(model.windowed)
    return [
        f"{count} of {model.layers} layers see only the last {window:,} tokens; the architecture "
        f"{facts.architecture!r} has no key for that, so llama.cpp lets them see everything: in "
        f"texts longer than {window:,} tokens it computes something else"
    ]


def rope_factors(model: ModelFacts) -> list[float] | None:
    """Divisors of the head_dim / 2 rope frequencies, for `rope_freqs.weight`; None where all are 1.

    Llama 3.1's rule, as transformers' `_compute_llama3_parameters` computes it: short wavelengths
    are kept, long ones divided by `factor`, and between them the frequency is interpolated.
    """
    rope = _rope(model)
    if rope["rope_type"] != "llama3":
        return None
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


def _rope_scaling(model: ModelFacts) -> dict[str, Value]:
    rope = _rope(model)
    match rope["rope_type"]:
        case "default" | "llama3":
            return {}
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        case "yarn":
            return _yarn(model, rope)
        case "dynamic":
            # transformers rescales only beyond max_position_embeddings, which is written as the
            # context length: within it this is the unscaled rope, exactly.
            return {}
        case other:
            raise UnsupportedError(
                f"rope type {other!r} is not written to GGUF; default, linear, llama3, dynamic and "
                "yarn are. Export as safetensors."
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


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """The factor on cos and sin, as transformers' `_compute_yarn_parameters` computes it."""

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _rope(model: ModelFacts) -> Mapping[str, Any]:
    """The rope of the full-attention layers; a family names further ones in its metadata."""
    return model.rope.get("full_attention", model.rope)


def _refuse_inexpressible(model: ModelFacts, facts: ExportFacts) -> None:
    named = {source for source in facts.metadata.values() if isinstance(source, str)}
    taken = {
        "attention_softcap": None,
        "logit_softcap": None,
        "logit_divisor": 1.0,
        "residual_scale": 1.0,
        "attention_scale": model.head_dim**-0.5,
    } | {field: implied(model) for field, implied in facts.implied.items()}
    for field, usual in taken.items():
        value = getattr(model, field)
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
