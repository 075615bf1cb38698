"""Sizes and kinds of one model, read from its config alone: what planning and exporting need before any weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from .errors import ConfigError, UnsupportedError
from .family import Attention, Config, CustomBlock, FamilySpec, Glu, LayerSpec

if TYPE_CHECKING:
    from .kernels import Activation

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""What transformers calls an activation -> what the engine calls it."""


SEPARATE: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
"""The groups of a dense layer each of whose projections is a module of its own."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes are elements; windows holds, for each layer, the sliding window in tokens or None.

    rope: the config's rope parameters, normalised: always `rope_type` and `rope_theta`; per layer type where the config
    keeps them so (Gemma 3). logit_divisor divides the logits before the loss, residual_scale multiplies each block's
    output before it is added (both 1 but for Granite). post_norms: a block's output goes through a norm before it is
    added (Gemma 2). groups: the projections that share their input, by role, under the name of what they make.
    own: the family's own blocks, by what they stand for ("attention", "mlp"); activation is None where the MLP is one.
    config: what all this was read from, the family's defaults filled in.
    """

    family: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    activation: Activation | None
    max_positions: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    post_norms: bool
    attention_scale: float
    attention_softcap: float | None
    attention_dropout: float
    logit_softcap: float | None
    logit_divisor: float
    residual_scale: float
    windows: tuple[int | None, ...]
    rope: Mapping[str, Any]
    config: Config
    groups: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: dict(SEPARATE), hash=False
    )
    own: Mapping[str, CustomBlock] = field(default_factory=dict[str, CustomBlock], hash=False)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the projections of a dense layer, by role."""
        d, i, q, kv = (
            self.hidden_size,
            self.intermediate_size,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        shapes = {
            "q": (q, d),
            "k": (kv, d),
            "v": (kv, d),
            "qkv": (q + 2 * kv, d),
            "o": (d, q),
            "gate": (i, d),
            "up": (i, d),
            "gate_up": (2 * i, d),
            "down": (d, i),
        }
        for block in self.own.values():
            shapes.update(block.shapes(self))
        return {role: shapes[role] for roles in self.groups.values() for role in roles}

    @property
    def window(self) -> int | None:
        """The sliding window, in tokens, of the layers that have one; None where none has."""
        return next((window for window in self.windows if window is not None), None)

    @property
    def windowed(self) -> list[bool]:
        """For each layer, whether it has the sliding window."""
        return [window is not None for window in self.windows]

    @property
    def window_rope_theta(self) -> float:
        """The rope base of the layers with a sliding window; Gemma 3 gives them one of their own."""
        return float(self.rope.get("sliding_attention", self.rope)["rope_theta"])

    @property
    def rotary_dim(self) -> int:
        """How many of each head's dimensions are rotated, in the layers that see everything."""
        rope = self.rope.get("full_attention", self.rope)
        return int(self.head_dim * rope.get("partial_rotary_factor", 1.0))

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's projections."""
        return sum(n * k for n, k in self.linear_shapes().values())


def facts_of(family: FamilySpec, config: Config) -> ModelFacts:
    """Reads a config as `family` says it is kept.

    Raises:
        ConfigError: a size or the activation is missing, a size is not a positive integer, or sizes contradict each
            other.
        UnsupportedError: the activation, or a layer's kind of attention, is none that the engine has, or the config
            sets a key that the family refuses.

    """
    keys = family.keys
    config = {**keys.defaults, **config}
    layer = family.layer_spec(config, 0)
    for key, why in keys.refused.items():
        if config.get(key):
            raise UnsupportedError(
                f"config.json: {key!r} is {config[key]!r}: {why}. Train this model without wiring it."
            )
    hidden = _size(config, keys.hidden_size, family)
    heads = _size(config, keys.heads, family)
    layers = _size(config, keys.layers, family)
    kv_heads = _size(config, keys.kv_heads, family, default=heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{keys.heads}={heads} is not a multiple of {keys.kv_heads}={kv_heads}; "
            "every key/value head serves the same number of query heads. Check config.json."
        )
    if config.get(keys.head_dim) is None and hidden % heads:
        raise ConfigError(
            f"{keys.hidden_size}={hidden} is not a multiple of {keys.heads}={heads} and config.json "
            f"has no {keys.head_dim!r}; add it, or correct the sizes."
        )
    head_dim = _size(config, keys.head_dim, family, default=hidden // heads)
    attention, mlp = layer.attention, layer.mlp
    parts = {"attention": attention, "mlp": mlp}
    own = {name: part for name, part in parts.items() if isinstance(part, CustomBlock)}
    return ModelFacts(
        family=family.name,
        model_type=str(config.get("model_type")),
        hidden_size=hidden,
        intermediate_size=_size(config, keys.intermediate_size, family),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_size(config, keys.vocab_size, family),
        norm_eps=float(config.get(keys.norm_eps, 1e-6)),
        activation=None if "mlp" in own else _activation(config, family),
        max_positions=_size(config, keys.max_positions, family, default=2048),
        tied=bool(config.get(keys.tied, False)),
        qkv_bias=isinstance(attention, Attention) and _flag(config, attention.qkv_bias),
        o_bias=isinstance(attention, Attention) and _flag(config, attention.o_bias),
        mlp_bias=isinstance(mlp, Glu) and _flag(config, mlp.bias),
        qk_norm=isinstance(attention, Attention) and attention.q_norm is not None,
        post_norms=layer.norms.after_attention is not None or layer.norms.after_mlp is not None,
        attention_scale=_attention_scale(config, family, head_dim),
        attention_softcap=_number(config, keys.attention_softcap),
        attention_dropout=_number(config, keys.attention_dropout) or 0.0,
        logit_softcap=_number(config, keys.logit_softcap),
        logit_divisor=_number(config, keys.logit_divisor) or 1.0,
        residual_scale=_number(config, keys.residual_scale) or 1.0,
        windows=_windows(config, family, layers),
        rope=_rope(config),
        config=config,
        groups=_groups(layer),
        own=own,
    )


def _groups(layer: LayerSpec) -> dict[str, tuple[str, ...]]:
    """The layer's projections as they run together; each of a family's own block by itself."""
    groups: dict[str, tuple[str, ...]] = {}
    for part, names in ((layer.attention, ("qkv", "o")), (layer.mlp, ("gate_up", "down"))):
        if isinstance(part, CustomBlock):
            groups |= {role: (role,) for role in part.projections}
        else:
            fused = layer.projections
            groups |= {name: (name,) if name in fused else SEPARATE[name] for name in names}
    return groups


def _size(config: Config, key: str, family: FamilySpec, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(
            f"config.json: {key!r} is {value!r}, expected a positive integer "
            f"(family {family.name!r}). Check that the config belongs to this model."
        )
    return value


def _number(config: Config, key: str | None) -> float | None:
    value = None if key is None else config.get(key)
    return None if value is None else float(value)


def _flag(config: Config, value: bool | str) -> bool:
    return bool(config.get(value, False)) if isinstance(value, str) else value


def _activation(config: Config, family: FamilySpec) -> Activation:
    key = family.keys.activation
    if key not in config:
        raise ConfigError(
            f"config.json has no {key!r}, and the family {family.name!r} no default for it. Add it to config.json, "
            "or to the family's ConfigKeys.defaults."
        )
    name = config[key]
    known: dict[str, Activation] = {**ACTIVATIONS, **family.keys.activations}
    if not isinstance(name, str) or name not in known:
        raise UnsupportedError(
            f"config.json: {key!r} is {name!r}; the engine has {', '.join(sorted(known))}. "
            "Train this model without wiring it, or bring a block of your own (docs/write-a-family.md)."
        )
    return known[name]


def _attention_scale(config: Config, family: FamilySpec, head_dim: int) -> float:
    scale = _number(config, family.keys.attention_scale)
    if scale is not None:
        return scale
    return (_number(config, family.keys.query_scale) or head_dim) ** -0.5


def _windows(config: Config, family: FamilySpec, layers: int) -> tuple[int | None, ...]:
    keys = family.keys
    switched_off = keys.use_window is not None and not config.get(keys.use_window, False)
    if keys.window is None or config.get(keys.window) is None or switched_off:
        return (None,) * layers
    window = _size(config, keys.window, family)
    kinds = None if keys.layer_types is None else config.get(keys.layer_types)
    if kinds is None:
        kinds = _layer_types(config, family, layers)
    if len(kinds) < layers:
        raise ConfigError(
            f"config.json: {keys.layer_types!r} names {len(kinds)} layers, {keys.layers!r} says {layers}; "
            "expected one entry for each layer."
        )
    unknown = set(kinds) - _WINDOWED.keys()
    if unknown:
        raise UnsupportedError(
            f"config.json: {keys.layer_types!r} has {', '.join(sorted(map(repr, unknown)))}; the engine has "
            f"{', '.join(_WINDOWED)}. Train this model without wiring it."
        )
    return tuple(window if _WINDOWED[kind] else None for kind in kinds[:layers])


_WINDOWED = {"sliding_attention": True, "full_attention": False}


def _layer_types(config: Config, family: FamilySpec, layers: int) -> list[str]:
    """What `layer_types` would say, for a config from before there was such a list."""
    keys = family.keys
    pattern, start = keys.window_pattern, 0
    if isinstance(pattern, str):
        pattern = _size(config, pattern, family)
    if keys.window_start is not None:
        start = int(config.get(keys.window_start) or 0)
    return [
        "full_attention"
        if i < start or (pattern is not None and (i + 1) % pattern == 0)
        else "sliding_attention"
        for i in range(layers)
    ]


def _rope(config: Config) -> Mapping[str, Any]:
    """Transformers 5 keeps `rope_parameters`; checkpoints before it `rope_theta` and `rope_scaling`."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        parameters = dict(config.get("rope_scaling") or {})
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in config:
                parameters[key] = config[key]
        if "rope_local_base_freq" in config:
            return {
                "full_attention": _rope_entry(parameters),
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": float(config["rope_local_base_freq"]),
                },
            }
    parameters = cast("Mapping[str, Any]", parameters)
    nested = {
        k: _rope_entry(cast("Mapping[str, Any]", v))
        for k, v in parameters.items()
        if isinstance(v, Mapping)
    }
    return nested or _rope_entry(parameters)


def _rope_entry(parameters: Mapping[str, Any]) -> dict[str, Any]:
    entry = {k: v for k, v in parameters.items() if k != "type"}
    entry["rope_type"] = parameters.get("rope_type", parameters.get("type", "default"))
    entry["rope_theta"] = float(parameters.get("rope_theta", 10000.0))
    return entry
