"""The transformers config of a GGUF file: the format's own keys, and those that a family's description maps.

What an exporter writes by `FamilySpec.exports["gguf"]` is read back by it. Defaults for keys that a file
lacks are those of llama.cpp.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hotloop_core import Attention, Glu, discover, facts_of
from hotloop_core.errors import (
    AmbiguousFamilyError,
    CheckpointError,
    ConfigError,
    NoFamilyError,
    UnsupportedError,
)
from hotloop_core.gguf import gguf_name

from .gguf_file import read_gguf, reads_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hotloop_core import ExportFacts, FamilySpec

    from .gguf_file import GgufFile

_KINDS = {True: "sliding_attention", False: "full_attention"}
_FACTORS = "rope_freqs.weight"
_LONGROPE = {f"{length}_factor": f"rope_factors_{length}.weight" for length in ("short", "long")}
"""transformers' name for the divisors of the frequencies -> the tensor that holds them (Phi-3)."""


@reads_metadata
def gguf_config(path: Path) -> dict[str, Any]:
    """The transformers config of a GGUF file, rope scaling included, as a mapping.

    Raises:
        CheckpointError: the file is truncated, or lacks a key. NoFamilyError: no installed family is
            written under its architecture. UnsupportedError: it does what no config here can say.

    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    file = read_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))
    prefix = f"{architecture}."
    said = {
        key.removeprefix(prefix): _shortest(value)
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    model_type, spec = _family(architecture, said, path)
    exported = spec.exports["gguf"]
    # The format's own keys go before those that the family adds: two of them may say one thing.
    values = _of_the_family(spec, exported, said) | _sizes(spec, exported, said, file)
    values |= _biases(spec, exported, values, file)
    values["rope_parameters"] = _rope(spec, exported, said, file, values[spec.keys.head_dim])
    for role, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        values[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    try:
        config = AutoConfig.for_model(model_type, **values).to_dict()
    except (ValueError, StrictDataclassError) as error:
        raise ConfigError(f"{path.name}: {error}") from error
    scale = exported.implied.get("attention_scale")
    if scale is not None and spec.keys.query_scale is not None:
        config[spec.keys.query_scale] = round(scale(facts_of(spec, config)) ** -2)
    windowed = exported.implied.get("windowed")
    if windowed is not None and spec.keys.window is not None and spec.keys.layer_types is not None:
        layers = windowed(facts_of(spec, config))
        config[spec.keys.layer_types] = [_KINDS[each] for each in layers]
        if not any(layers):
            config[spec.keys.window] = None
    return config


def _family(architecture: str, said: Mapping[str, Any], path: Path) -> tuple[str, FamilySpec]:
    """The model type that an architecture stands for, and its family.

    Several may be written under one architecture. The family is meant that knows most of the file's keys (OLMo 3's
    windows under "olmo2"); among equals (Mistral under "llama") the type of that name, since the file computes what
    that one computes.
    """
    claims = {
        model_type: family
        for family in discover().families
        if "gguf" in family.exports and family.exports["gguf"].architecture == architecture
        for model_type in family.model_types
    }
    known = {t: len(f.exports["gguf"].metadata.keys() & said.keys()) for t, f in claims.items()}
    claims = {t: f for t, f in claims.items() if known[t] == max(known.values())}
    if architecture in claims:
        return architecture, claims[architecture]
    if len(claims) == 1:
        return claims.popitem()
    if claims:
        raise AmbiguousFamilyError(
            f"{path.name} has the architecture {architecture!r}, under which "
            f"{', '.join(sorted(claims))} are written; install the family of that name "
            f"(`uv add hotloop-{architecture}`), or load the model's original folder."
        )
    readable = {f.exports["gguf"].architecture for f in discover().families if "gguf" in f.exports}
    raise NoFamilyError(
        f"{path.name} has the architecture {architecture!r}; the installed families read "
        f"{', '.join(sorted(readable)) or 'none'}. Install its family, or write one: "
        "docs/write-a-family.md"
    )


def _sizes(
    spec: FamilySpec, exported: ExportFacts, said: Mapping[str, Any], file: GgufFile
) -> dict[str, Any]:
    keys = spec.keys

    def broken(what: str) -> CheckpointError:
        return CheckpointError(
            f"{file.path.name}: {what}; make the file again or load the model's original folder"
        )

    def size(key: str, default: int | None = None) -> int:
        value = said.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise UnsupportedError(
                f"{file.path.name}: {key!r} differs from layer to layer ({value}); expected one "
                "number. Load another model."
            )
        if not isinstance(value, int) or value < 1:
            raise broken(f"{key!r} of its architecture is {value!r}, expected a positive integer")
        return value

    embedding = file.tensors.get(f"{gguf_name(exported, 'embedding')}.weight")
    if embedding is None:
        raise broken("it has no embedding")
    epsilon = said.get("attention.layer_norm_rms_epsilon", said.get("attention.layer_norm_epsilon"))
    if not isinstance(epsilon, float):
        raise broken(f"the epsilon of its norms is {epsilon!r}, expected a number")
    hidden, heads = size("embedding_length"), size("attention.head_count")
    return {
        keys.hidden_size: hidden,
        keys.intermediate_size: size("feed_forward_length"),
        keys.layers: size("block_count"),
        keys.heads: heads,
        keys.kv_heads: size("attention.head_count_kv", heads),
        keys.head_dim: size("attention.key_length", hidden // heads),
        keys.vocab_size: embedding.shape[0],
        keys.norm_eps: epsilon,
        keys.max_positions: size("context_length"),
        keys.tied: f"{gguf_name(exported, 'head')}.weight" not in file.tensors,
    }


def _biases(
    spec: FamilySpec, exported: ExportFacts, config: Mapping[str, Any], file: GgufFile
) -> dict[str, bool]:
    """The switches of biases, where the config has any: on where the first layer holds one."""
    layer = spec.layer_spec({**spec.keys.defaults, **config}, 0)
    switches: list[tuple[bool | str, str]] = []
    if isinstance(layer.attention, Attention):
        first = next(iter(layer.attention.projections))
        switches += [(layer.attention.qkv_bias, first), (layer.attention.o_bias, "o")]
    if isinstance(layer.mlp, Glu):
        switches.append((layer.mlp.bias, next(iter(layer.mlp.projections))))
    found: dict[str, bool] = {}
    for key, role in switches:
        if isinstance(key, str):
            held = f"{gguf_name(exported, role, 0)}.bias" in file.tensors
            found[key] = found.get(key, False) or held
    return found


def _of_the_family(
    spec: FamilySpec, exported: ExportFacts, said: Mapping[str, Any]
) -> dict[str, Any]:
    """`ExportFacts.metadata` read backwards: config key -> value, for the keys that the file has."""
    config: dict[str, Any] = {}
    for key, source in exported.metadata.items():
        value = said.get(key)
        if value is None or not isinstance(source, str) or (source == "window" and not value):
            continue  # a window of 0 is none (Phi-4)
        if source == "windowed":
            name, value = spec.keys.layer_types, _layer_types(value, said)
        elif source.startswith("config."):
            name = source.removeprefix("config.")
        else:
            name = getattr(spec.keys, source, None)
        if isinstance(name, str):
            config[name] = value
    return config


def _layer_types(pattern: list[int] | int, said: Mapping[str, Any]) -> list[str]:
    """pattern: for each layer whether it has the window, or n: all have it but every n-th."""
    if isinstance(pattern, list):
        return [_KINDS[bool(windowed)] for windowed in pattern]
    return [_KINDS[bool((i + 1) % pattern)] for i in range(said["block_count"])]


def _rope(
    spec: FamilySpec,
    exported: ExportFacts,
    said: Mapping[str, Any],
    file: GgufFile,
    head_dim: int,
) -> dict[str, Any]:
    theta = float(said.get("rope.freq_base", 10000.0))
    two_sets = file.tensors.keys() & set(_LONGROPE.values())
    rope = {
        "rope_theta": theta,
        **(_longrope(said, file) if two_sets else _rope_scaling(said, file)),
    }
    if exported.metadata.get("rope.dimension_count") == "rotary_dim":
        rope["partial_rotary_factor"] = said.get("rope.dimension_count", head_dim) / head_dim
    if _FACTORS in file.tensors:
        divisors = [float(divisor) for divisor in file.dequantise(_FACTORS)]
        rope |= _llama3_scaling(divisors, theta)
    for key, source in exported.metadata.items():
        if source == "window_rope_theta":
            local = said.get(key, spec.keys.defaults.get("rope_local_base_freq", theta))
            sliding = {"rope_type": "default", "rope_theta": float(local)}
            return {"full_attention": rope, "sliding_attention": sliding}
    return rope


def _rope_scaling(said: Mapping[str, Any], file: GgufFile) -> dict[str, Any]:
    factor = float(said.get("rope.scaling.factor", said.get("rope.scale_linear")) or 1.0)
    match said.get("rope.scaling.type", "linear"):
        case "none":
            return {"rope_type": "default"}
        case "linear":
            scaled = {"rope_type": "linear", "factor": factor}
            return {"rope_type": "default"} if factor == 1.0 else scaled
        case "yarn":
            scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
            original = said.get("rope.scaling.original_context_length")
            if original is not None:
                scaling["original_max_position_embeddings"] = original
            ratio = said.get("rope.scaling.attn_factor")
            if ratio is not None:  # llama.cpp multiplies it with the factor that is usual
                scaling["attention_factor"] = _shortest(ratio * (1.0 + 0.1 * math.log(factor)))
            return scaling
        case other:
            raise UnsupportedError(
                f"{file.path.name}: its rope is scaled as {other!r}; read are none, linear, yarn and "
                f"longrope with {' and '.join(_LONGROPE.values())}. Load the model's original folder."
            )


def _longrope(said: Mapping[str, Any], file: GgufFile) -> dict[str, Any]:
    """Phi-3's two sets of divisors, for texts within the original length and beyond."""
    missing = [name for name in _LONGROPE.values() if name not in file.tensors]
    original = said.get("rope.scaling.original_context_length")
    if missing or not isinstance(original, int):
        raise CheckpointError(
            f"{file.path.name}: a rope of the type longrope needs {', '.join(_LONGROPE.values())} and the key "
            "'rope.scaling.original_context_length'; make the file again or load the model's original folder"
        )
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": said.get("rope.scaling.attn_factor", 1.0),
        **{
            key: [_shortest(float(divisor)) for divisor in file.dequantise(name)]
            for key, name in _LONGROPE.items()
        },
    }


def _llama3_scaling(divisors: list[float], theta: float) -> dict[str, Any]:
    """Rope parameters from `rope_freqs.weight`, which divides each frequency (Llama 3.1).

    The file holds the divisors, not what made them. Meta's models all have low 1, high 4 and 8,192
    original positions; the divisors that follow from these and the largest one are compared with
    the file's.
    """
    low, high, original, factor = 1.0, 4.0, 8192, max(divisors)
    expected: list[float] = []
    for index in range(len(divisors)):
        turns = original / (2 * math.pi * theta ** (index / len(divisors)))
        if turns <= low or turns >= high:
            expected.append(factor if turns <= low else 1.0)
            continue
        smooth = (turns - low) / (high - low)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if any(abs(a - b) > 1e-3 * b for a, b in zip(divisors, expected, strict=True)):
        raise UnsupportedError(
            "rope_freqs.weight holds frequency divisors other than Llama 3.1's; load the model's "
            "original folder, whose config.json says how its rope is scaled."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that rounds to it: 1e-06, not 9.99999997e-07."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value
