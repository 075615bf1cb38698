"""Reads one layer's parts from a trace: which norm stands where, which projection is which, what multiplies what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import UnsupportedError
from hotloop_core.facts import ACTIVATIONS
from torch import Tensor, nn

from .trace import CLOSE, Call, Trace, same

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAMES = {
    "q": {"q_proj", "wq", "query", "q"},
    "k": {"k_proj", "wk", "key", "k"},
    "v": {"v_proj", "wv", "value", "v"},
    "o": {"o_proj", "out_proj", "wo", "dense", "o"},
}
FUNCTIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
KEYS: dict[str, tuple[str, ...]] = {
    "norm_eps": (
        "rms_norm_eps",
        "layer_norm_eps",
        "norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
    ),
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


@dataclass(eq=False)
class Reading:
    """What has been read so far: what cannot be said stops the guess, a note does not."""

    model: Any
    seen: Trace
    config: Mapping[str, Any]
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, Any] = field(default_factory=dict)
    norms: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    def one(self, candidates: Iterable[str]) -> str | None:
        """The first of the candidates that the config has."""
        return next((key for key in candidates if key in self.config), None)


def halves(reading: Reading) -> tuple[Call, Call]:
    """The calls of the attention and the MLP module, the layer's two children that have projections."""
    children = [c for c in reading.seen.calls if "." not in c.path]
    halves = [c for c in children if reading.seen.inside(c.path, nn.Linear)]
    attention = [c for c in halves if "attn" in c.path or "attention" in c.path]
    others = [c for c in halves if c not in attention]
    if len(attention) != 1 or len(others) != 1:
        found = ", ".join(c.path for c in halves) or "none"
        raise UnsupportedError(
            f"{type(reading.model).__name__}: expected one attention and one MLP module in a layer, found {found}. "
            "Bring a block of your own: docs/write-a-family.md"
        )
    return attention[0], others[0]


def read_norms(reading: Reading, attention: Call, mlp: Call) -> None:
    """Where each norm stands, by whose result the blocks get and whose input their results are."""
    roles: dict[str, Call] = {}
    for call in reading.seen.norms():
        if "." in call.path:
            continue
        if call.result is attention.given:
            roles["before_attention"] = call
        elif call.given is attention.result:
            roles["after_attention"] = call
        elif call.result is mlp.given:
            roles["before_mlp"] = call
        elif call.given is mlp.result:
            roles["after_mlp"] = call
        else:
            reading.missing.append(
                f"a norm {call.path!r} that stands neither before nor after a block"
            )
    x = reading.seen.x
    middle = roles["before_mlp"].given if "before_mlp" in roles else mlp.given
    if same(middle, x) or mlp.given is attention.given:
        reading.missing.append("attention and MLP beside each other (a parallel residual)")
    else:
        _read_residual(reading, roles, attention, mlp, middle)
    reading.norms = {role: call.path for role, call in roles.items()}
    final = final_norm(reading)
    kinds = {_norm_kind(module) for module in (*(c.module for c in roles.values()), final)}
    if len(kinds) != 1:
        reading.missing.append(f"norms of several kinds: {sorted(map(str, kinds))}")
        return
    (kind,) = kinds
    if kind is None:
        reading.missing.append(
            f"a norm {type(final).__name__} that is neither RMSNorm nor LayerNorm"
        )
        return
    reading.norms |= {"kind": kind[0], "offset": kind[1]}


def _read_residual(
    reading: Reading, roles: dict[str, Call], attention: Call, mlp: Call, middle: Tensor
) -> None:
    """x + s·attention, then middle + s·mlp, with one s for both."""
    added = (
        (middle - reading.seen.x, roles.get("after_attention", attention).result),
        (reading.seen.y - middle, roles.get("after_mlp", mlp).result),
    )
    scales = [float((sum_ * part).sum() / part.square().sum()) for sum_, part in added]
    fits = [same(scale * part, sum_) for scale, (sum_, part) in zip(scales, added, strict=True)]
    if not all(fits) or abs(scales[0] - scales[1]) > CLOSE:
        reading.missing.append("a residual stream that is not x + s · block(x) with one s")
    elif abs(scales[0] - 1) > CLOSE:
        _named(reading, "residual_scale", scales[0], "what each block's output is multiplied by")


def read_attention(reading: Reading, attention: Call) -> None:
    """Projections by their names; norms over heads and the scale by what they do."""
    linears = reading.seen.inside(attention.path, nn.Linear)
    for role, names in NAMES.items():
        found = [c.path for c in linears if c.path.rpartition(".")[2] in names]
        if len(found) == 1:
            reading.paths[role] = found[0]
    if len(reading.paths) < len(NAMES) or len(linears) != len(NAMES):
        shapes = ", ".join(_shape(c) for c in linears)
        reading.missing.append(f"attention whose projections are not q, k, v, o, but {shapes}")
    head_dim = _head_dim(reading)
    for call in reading.seen.norms():
        if not call.path.startswith(f"{attention.path}."):
            continue
        role = "q_norm" if call.path.rpartition(".")[2].startswith("q") else "k_norm"
        kind, width = _norm_kind(call.module), call.given.shape[-1]
        if width != head_dim:
            reading.missing.append(
                f"{call.path}, a norm over all heads together ({width} wide, a head {head_dim})"
            )
        elif kind is None or kind != (reading.norms.get("kind"), reading.norms.get("offset")):
            reading.missing.append(f"{call.path}, a norm of another kind than the layer's")
        reading.paths[role] = call.path
    scale = getattr(attention.module, "scaling", None)
    if scale is None:
        reading.notes.append(
            "attention scale: not found in the module; head_dim ** -0.5 is assumed"
        )
    elif abs(scale - head_dim**-0.5) > CLOSE:
        if _key_with(reading, scale**-2) is not None:
            reading.keys["query_scale"] = _key_with(reading, scale**-2)
        else:
            _named(reading, "attention_scale", scale, "the attention scale")


def _shape(call: Call) -> str:
    weight: Any = call.module.weight
    return f"{call.path} {tuple(weight.shape)}"


def read_mlp(reading: Reading, mlp: Call) -> None:
    """Gate, up, down and the activation, whichever product the down projection got."""
    linears = reading.seen.inside(mlp.path, nn.Linear)
    shapes = ", ".join(_shape(c) for c in linears)
    if len(linears) != 3:
        reading.missing.append(f"an MLP that is not gate, up and down, but {shapes}")
        return
    *inner, down = linears
    tried = [
        (float((function(gate.result) * up.result - down.given).norm()), name, gate, up)
        for gate, up in (inner, inner[::-1])
        for name, function in FUNCTIONS.items()
    ]
    distance, name, gate, up = min(tried, key=lambda each: each[0])
    if distance > CLOSE * float(down.given.norm()):
        reading.missing.append(
            f"an MLP ({shapes}) whose activation is none of {', '.join(FUNCTIONS)}"
        )
        return
    reading.paths |= {"gate": gate.path, "up": up.path, "down": down.path}
    keys = [k for k, v in reading.config.items() if "act" in k and v in ACTIVATIONS]
    if not keys:
        reading.missing.append(f"an activation {name} that the config does not name")
        return
    reading.keys["activation"] = keys[0]
    called = str(reading.config[keys[0]])
    if ACTIVATIONS[called] != name:
        reading.keys["activations"] = {called: name}


def read_root(reading: Reading) -> None:
    """The keys of the config that are known by name, and what is done to the logits."""
    for name, candidates in KEYS.items():
        key = reading.one(candidates)
        if key is not None:
            reading.keys[name] = key
    if reading.keys.get("window") is None:
        for name in ("use_window", "window_start", "window_pattern", "layer_types"):
            reading.keys.pop(name, None)
    if "norm_eps" not in reading.keys:
        reading.missing.append(
            "an epsilon of the norms that the config does not hold under a known key"
        )
    model = reading.model
    with torch.no_grad():
        hidden = torch.randn(
            1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        decoder = model.get_submodule(decoder_path(reading))
        hook = decoder.register_forward_hook(lambda *_: _Outputs(hidden))
        try:
            found = model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
        finally:
            hook.remove()
        plain = model.get_output_embeddings()(hidden)
    cap = reading.config.get(reading.keys.get("logit_softcap", ""))
    if cap:
        found = torch.atanh((found / cap).clamp(-1 + 1e-7, 1 - 1e-7)) * cap
    divisor = float(plain.square().sum() / (plain * found).sum())
    if abs(divisor - 1) > 1e-2:
        factor = _key_with(reading, 1 / divisor, 1e-2)
        if factor is not None:
            reading.missing.append(f"logits that are multiplied by {factor!r}")
        else:
            _named(reading, "logit_divisor", divisor, "what the logits are divided by", close=1e-2)


class _Outputs(dict[str, Tensor]):
    """Hidden states in the shape of a decoder's output."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)
        self.last_hidden_state = hidden
        self.past_key_values = self.hidden_states = self.attentions = None

    def __getitem__(self, index: Any) -> Tensor:
        return self.last_hidden_state


def decoder_path(reading: Reading) -> str:
    """The path of the module that holds the layers."""
    return reading.seen.layers.rpartition(".")[0]


def final_norm(reading: Reading) -> nn.Module:
    """The norm behind the layers."""
    decoder = reading.model.get_submodule(decoder_path(reading))
    norms = [
        m
        for name, m in decoder.named_children()
        if "norm" in type(m).__name__.lower() or "norm" in name
    ]
    if len(norms) != 1:
        raise UnsupportedError(
            f"expected one norm behind the layers, found {len(norms)} in {decoder_path(reading)!r}"
        )
    return norms[0]


def _norm_kind(module: nn.Module) -> tuple[str, float] | None:
    """("rms" or "layer", offset), by what it computes."""
    weight = getattr(module, "weight", None)
    width = 64 if weight is None else weight.shape[-1]
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    w = torch.ones(width) if weight is None else weight
    bias = getattr(module, "bias", None)
    eps = next(
        (getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), 1e-6
    )
    with torch.no_grad():
        y = module(x)
        rms = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        centred = nn.functional.layer_norm(x, (width,), eps=eps)
        b = 0.0 if bias is None else bias
        for kind, normed, offset in (("rms", rms, 0.0), ("rms", rms, 1.0), ("layer", centred, 0.0)):
            if same(normed * (offset + w) + b, y):
                return kind, offset
    return None


def _head_dim(reading: Reading) -> int:
    config = reading.config
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _key_with(reading: Reading, value: float, close: float = CLOSE) -> str | None:
    """The config's key whose number this is."""
    return next(
        (
            key
            for key, v in reading.config.items()
            if isinstance(v, int | float)
            and not isinstance(v, bool)
            and abs(v - value) <= close * abs(value)
        ),
        None,
    )


def _named(reading: Reading, name: str, value: float, what: str, close: float = CLOSE) -> None:
    """Notes under which key the config keeps a number that was measured."""
    key = _key_with(reading, value, close)
    if key is None:
        reading.missing.append(f"{what}: {value:.4g}, which no key of the config holds")
    else:
        reading.keys[name] = key
