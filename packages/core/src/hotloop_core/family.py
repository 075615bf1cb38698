"""How a family describes itself: what a decoder layer is, where a config keeps its sizes, how tensors are exported.

A description names modules by their path in the transformers model and says what kind each is. It holds no code: one
engine runs every description, so a faster kernel serves every family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError

if TYPE_CHECKING:
    from .facts import ModelFacts
    from .kernels import Activation

API = 1
"""The version of the types in this module and in `exporter`, `hooks`. Core accepts this one and the one before."""

NormKind = Literal["rms", "layer"]
Config = Mapping[str, Any]
"""A model's `config.json` as a mapping (`PreTrainedConfig.to_dict()` gives the same)."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The norms of a decoder layer, by path within the layer.

    x + after_attention(attention(before_attention(x))), then the same around the MLP. A norm that is None is absent:
    Llama has the two `before_*`, Gemma 2 all four, OLMo 2 the two `after_*`.
    offset: y = x_normed * (offset + w), 1 for Gemma. It holds for the final norm and the q/k norms too.
    """

    before_attention: str | None
    before_mlp: str | None
    after_attention: str | None = None
    after_mlp: str | None = None
    kind: NormKind = "rms"
    offset: float = 0.0


def _present(paths: Mapping[str, str | None]) -> dict[str, str]:
    return {role: path for role, path in paths.items() if path is not None}


def _either(part: str, fused: str, path: str | None, apart: Mapping[str, str | None]) -> None:
    """Raises ConfigError unless there is the fused projection or each of those apart, not some of both."""
    given = _present(apart)
    if (path is None and len(given) < len(apart)) or (path is not None and given):
        raise ConfigError(
            f"{part} names {', '.join([*given, *([fused] if path is not None else [])]) or 'no projection'}; "
            f"expected {', '.join(apart)}, or {fused} alone"
        )


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention with rotary positions, by paths within the layer.

    q, k, v, or qkv: one projection each, or one whose output holds all of q, then k, then v (Phi-3).
    module: the attention module itself, whose hooks and attributes the wiring checks.
    qkv_bias, o_bias: True, False, or the config key that says it.
    q_norm, k_norm: norms before the rotation. norm_over: each head (Qwen3, Gemma 3) or all heads (OLMo 2).
    interleaved: pairs of the rotation are even/odd dimensions instead of the two halves.
    rotary: False for a layer whose heads are not rotated (SmolLM3 has one in four; arXiv:2501.18795).
    """

    o: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    module: str = "self_attn"
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    q_norm: str | None = None
    k_norm: str | None = None
    norm_over: Literal["head", "all"] = "head"
    interleaved: bool = False
    rotary: bool = True

    def __post_init__(self) -> None:
        _either("Attention", "qkv", self.qkv, {"q": self.q, "k": self.k, "v": self.v})

    @property
    def projections(self) -> dict[str, str]:
        """Role -> path of the linear modules, in the order of forward."""
        return _present({"q": self.q, "k": self.k, "v": self.v, "qkv": self.qkv, "o": self.o})


@dataclass(frozen=True, kw_only=True)
class Glu:
    """down(act(gate(x)) * up(x)), by paths within the layer.

    gate, up, or gate_up: one projection each, or one whose output holds all of gate, then up (Phi-3, GLM-4).
    bias: True, False, or the config key that says it.
    """

    down: str
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    module: str = "mlp"
    bias: bool | str = False

    def __post_init__(self) -> None:
        _either("Glu", "gate_up", self.gate_up, {"gate": self.gate, "up": self.up})

    @property
    def projections(self) -> dict[str, str]:
        """Role -> path of the linear modules, in the order of forward."""
        return _present(
            {"gate": self.gate, "up": self.up, "gate_up": self.gate_up, "down": self.down}
        )


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek V2, V3; arXiv:2405.04434 section 2.1), by paths within the layer."""

    q: str | None
    q_down: str | None
    q_up: str | None
    q_norm: str | None
    kv_down: str
    kv_up: str
    kv_norm: str
    o: str
    module: str = "self_attn"


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """Routed gated MLPs with fused 3-D expert weights, by paths within the layer."""

    router: str
    experts_gate_up: str
    experts_down: str
    shared: Glu | None = None
    module: str = "mlp"


@dataclass(frozen=True, kw_only=True)
class CustomBlock:
    """A block that the family brings itself, in place of `Attention` or `Glu`: what stands between the layer's norms.

    target: "package.module:Class", a `blocks.Block`, imported when a layer first runs.
    module: path within the layer of the submodule whose work it does.
    projections: role -> path of its linear modules, which adapters, 4-bit weights and streaming reach.
    shapes: facts of a model -> (out_features, in_features) of each role. They and `kept` are what a plan counts with.
    kept: facts of a model -> elements per token that its forward keeps for backward.
    parameters: paths of its other modules with parameters.
    """

    target: str
    module: str
    projections: Mapping[str, str] = field(hash=False)
    shapes: Callable[[ModelFacts], Mapping[str, tuple[int, int]]]
    kept: Callable[[ModelFacts], int]
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What one decoder layer is.

    ops: op name -> the implementation that this layer wants, where it is not the device's usual one: the family's own,
    under a Protocol of `kernels`. What a caller of `wire` names goes before it.
    """

    norms: Norms
    attention: Attention | LatentAttention | CustomBlock
    mlp: Glu | MixtureOfExperts | CustomBlock
    ops: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)

    @property
    def projections(self) -> dict[str, str]:
        """Role -> path within the layer of the projections that adapters go to and that a budget streams."""
        return {
            role: path
            for part in (self.attention, self.mlp)
            if isinstance(part, Attention | Glu | CustomBlock)
            for role, path in part.projections.items()
        }


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """Where a config keeps each fact. None: the family has no such thing.

    query_scale: attention scale is value ** -0.5 (Gemma's query_pre_attn_scalar); else head_dim ** -0.5.
    attention_scale: the attention scale itself (Granite's attention_multiplier).
    refused: key -> why, for switches and dropouts that make a layer do what the description does not say. A config
    where one of them is true (or not zero) is refused with that reason.
    window: the sliding window, in tokens. use_window: a switch that must be true for it to count (Qwen 2).
    layer_types: the list that says which layers have the window. Where a config has no such list, all have it but
    every n-th, n being `window_pattern` (a number, or the key that holds it; Gemma), and but those before the layer
    that `window_start` names (Qwen 2).
    activations: names that mean another function here than elsewhere (Gemma's "gelu" is the tanh form).
    defaults: what a key is where a config lacks it; one that is there with the value null keeps that value.
    """

    hidden_size: str = "hidden_size"
    intermediate_size: str = "intermediate_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    vocab_size: str = "vocab_size"
    norm_eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    max_positions: str = "max_position_embeddings"
    tied: str = "tie_word_embeddings"
    query_scale: str | None = None
    attention_scale: str | None = None
    attention_softcap: str | None = None
    attention_dropout: str | None = "attention_dropout"
    logit_softcap: str | None = None
    logit_divisor: str | None = None
    residual_scale: str | None = None
    window: str | None = None
    use_window: str | None = None
    layer_types: str | None = "layer_types"
    window_pattern: str | int | None = None
    window_start: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    activations: Mapping[str, Activation] = field(default_factory=dict[str, "Activation"])
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class ExportFacts:
    """What an exporter of one format must know of a family, in that format's own terms.

    architecture: the format's name for it. names: role -> tensor name, `{layer}` standing for the index; only where it
    differs from the exporter's table. transforms: role -> name of a transform that the exporter documents.
    metadata: key of the format -> name of a field of `ModelFacts`, "config.KEY" for a key of the config, or a literal
    that is not a string.
    implied: field of `ModelFacts`, or "config.KEY" for a key of the config -> the value that readers of the format take
    for it, since it has no key for it; a model where it is another cannot be written. GGUF takes silu where no
    activation is named.
    """

    architecture: str
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    transforms: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    implied: Mapping[str, Callable[[ModelFacts], Any]] = field(
        default_factory=dict[str, "Callable[[ModelFacts], Any]"]
    )


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A model family. Paths are those of transformers' `...ForCausalLM`.

    layer: one description for every layer, or a function of (config, index) where layers differ in kind.
    exports: format name -> what its exporter must know.
    distribution: what to install to get it, for messages ("hotloop-llama").
    """

    api: int
    name: str
    model_types: frozenset[str]
    layer: LayerSpec | Callable[[Config, int], LayerSpec]
    keys: ConfigKeys = field(default_factory=ConfigKeys)
    decoder: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    exports: Mapping[str, ExportFacts] = field(default_factory=dict[str, ExportFacts])
    examples: tuple[str, ...] = ()

    def layer_spec(self, config: Config, index: int) -> LayerSpec:
        """The description of layer `index`."""
        return self.layer(config, index) if callable(self.layer) else self.layer
