"""What has been read of a family so far, and under which keys its config keeps what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hotloop_core import ConfigKeys
from hotloop_core.errors import UnsupportedError
from torch import Tensor, nn

from .trace import CLOSE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .trace import Call, Layer, Trace

KEYS: dict[str, tuple[str, ...]] = {
    "attention_dropout": ("attention_dropout", "attn_pdrop", "attn_dropout"),
    "attention_softcap": ("attn_logit_softcapping",),
    "logit_softcap": ("final_logit_softcapping",),
    "window": ("sliding_window",),
    "use_window": ("use_sliding_window",),
    "window_start": ("max_window_layers",),
    "window_pattern": ("sliding_window_pattern",),
    "layer_types": ("layer_types",),
}
"""Field of ConfigKeys -> the names that configs have for it."""
SIZES = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "vocab_size")


@dataclass(eq=False)
class Reading:
    """What has been read so far: what cannot be said stops the guess, a note does not.

    keys, norms: fields of ConfigKeys and Norms. paths: role -> path of a projection or of a norm over q or k.
    heads: further fields of Attention.
    """

    model: Any
    seen: Trace
    config: Mapping[str, Any]
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, Any] = field(default_factory=dict)
    norms: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> Layer:
        """The first layer."""
        return self.seen.layers[0]

    @property
    def decoder(self) -> str:
        """The path of the module that holds the layers."""
        return self.seen.path.rpartition(".")[0]

    def key_with(self, value: float, close: float = CLOSE) -> str | None:
        """The config's key whose number this is."""
        return next(
            (
                key
                for key, v in self.config.items()
                if isinstance(v, int | float)
                and not isinstance(v, bool)
                and abs(v - value) <= close * abs(value)
            ),
            None,
        )

    def name(self, name: str, value: float, what: str, close: float = CLOSE) -> None:
        """Notes under which key the config keeps a number that was measured."""
        key = self.key_with(value, close)
        if key is None:
            self.missing.append(f"{what}: {value:.4g}, which no key of the config holds")
        else:
            self.keys[name] = key


def read_keys(reading: Reading) -> None:
    """The keys of the config that are known by name, sizes that are called otherwise among them."""
    for name, candidates in KEYS.items():
        key = next((key for key in candidates if key in reading.config), None)
        if key is not None:
            reading.keys[name] = key
    if reading.keys.get("window") is None:
        for name in ("use_window", "window_start", "window_pattern", "layer_types"):
            reading.keys.pop(name, None)
    for size in SIZES:
        usual = getattr(ConfigKeys(), size)
        other = reading.model.config.attribute_map.get(usual)
        if usual not in reading.config and other is not None:
            reading.keys[size] = other


def halves(model: Any, layer: Layer) -> tuple[Call, Call]:
    """The calls of the attention and the MLP module, the layer's two children that have projections.

    Raises:
        UnsupportedError: there are others.
    """
    found = [c for c in layer.calls if "." not in c.path and layer.inside(c.path, nn.Linear)]
    attention = [c for c in found if "attn" in c.path or "attention" in c.path]
    others = [c for c in found if c not in attention]
    if len(attention) == len(others) == 1:
        return attention[0], others[0]
    loose = [c.path for c in layer.calls if "." not in c.path and isinstance(c.module, nn.Linear)]
    parts = [c.path for c in found] + [f"{path} (in the layer itself)" for path in loose]
    foreign = {
        type(call.module).__name__
        for call in layer.calls
        for weight in [getattr(call.module, "weight", None)]
        if isinstance(weight, Tensor) and weight.dim() == 2
        if not isinstance(call.module, nn.Linear)
    }
    why = (
        f", and projections of another class than nn.Linear: {', '.join(sorted(foreign))}"
        if foreign
        else ""
    )
    raise UnsupportedError(
        f"model_type={model.config.model_type!r}: expected one attention and one MLP module in layer {layer.index}, "
        f"found {', '.join(parts) or 'none'}{why}. A family describes no other layer: docs/write-a-family.md"
    )
