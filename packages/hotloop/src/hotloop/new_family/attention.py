"""What an attention module does with its projections: each known way is computed and held against its result."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

from hotloop_engine.attention import Sequences
from hotloop_engine.attention.reference import Reference
from hotloop_engine.ops.rope import reference as rope
from torch import Tensor, nn

from .mlp import shape_of
from .norms import norm_kind
from .trace import CLOSE, Call, Layer, same

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .reading import Reading

NOT_AT_ALL = "not at all"
ROTATIONS: dict[str, dict[str, bool]] = {
    "in halves": {},
    "in neighbouring pairs": {"interleaved": True},
    NOT_AT_ALL: {"rotary": False},
}
"""How heads are turned -> fields of Attention that say so."""
IN_TURN = "in neighbouring pairs whose cos and sin stand in turn (a, a, b, b) instead of in halves (a, b, a, b)"
"""A way to turn heads that no description says."""
NO_POSITIONS = "positions that do not come to the layer as a rotation (cos and sin)"


@dataclass(frozen=True, eq=False)
class Heads:
    """One way to find q, k, v [B, T, heads, K] in what the projections gave.

    paths: their roles. rows: how the rows of a fused projection are ordered, where no description says that.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    paths: dict[str, str]
    rows: str | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """A way that gives what the output projection was given."""

    heads: Heads
    norms: dict[str, Call]
    rotation: str
    scale: float


def read_attention(reading: Reading, halves: list[Call]) -> None:
    """Projections, norms over heads, rotation and scale, from what every layer's attention computes."""
    found = [
        _explain(reading, layer, call)
        for layer, call in zip(reading.seen.layers, halves, strict=True)
    ]
    first = found[0]
    wrong = next((each for each in found if isinstance(each, str)), None)
    if wrong is not None or isinstance(first, str):
        reading.missing.append(str(wrong))
        return
    if first.heads.rows is not None:
        (path,) = first.heads.paths.values()
        reading.missing.append(
            f"{path}, whose rows are {first.heads.rows}, not all of q, then k, then v"
        )
    if first.rotation == IN_TURN:
        reading.missing.append(f"heads that turn {IN_TURN}")
    if first.rotation == NOT_AT_ALL and reading.first.rotation is None:
        reading.missing.append(NO_POSITIONS)
    turned = [each.rotation for each in found if isinstance(each, Found)]
    other = next((i for i, rotation in enumerate(turned) if rotation != turned[0]), None)
    if other is not None:
        reading.missing.append(
            f"layers of several kinds: heads turn {turned[0]} in layer 0 and {turned[other]} in layer {other} "
            "(write `layer` as a function of config and index)"
        )
    o = reading.first.inside(halves[0].path, nn.Linear)[-1]
    reading.paths |= first.heads.paths | {"o": o.path}
    reading.heads |= ROTATIONS.get(first.rotation, {})
    _read_head_norms(reading, first)
    _name_scale(reading, first)


def _explain(reading: Reading, layer: Layer, attention: Call) -> Found | str:
    """The first way that holds, or why there is none."""
    linears = layer.inside(attention.path, nn.Linear)
    shapes = ", ".join(map(shape_of, linears))
    *inner, o = linears
    heads = getattr(reading.model.config, "num_attention_heads", 0)
    if not same(o.result, attention.result) or not heads or o.given.shape[-1] % heads:
        return f"attention whose result is not that of a projection of all heads ({shapes})"
    ways = list(_ways(inner, heads, o.given.shape[-1] // heads))
    if not ways:
        return f"attention whose projections are not q, k, v, o, or qkv, o, but {shapes}"
    norms = [c for c in layer.norms() if c.path.startswith(f"{attention.path}.")]
    for way in ways:
        roles = _head_norms(way, norms)
        if len(roles) == len(norms):
            for rotation, scale in _computed(reading, layer, attention, way, roles, o.given):
                return Found(way, roles, rotation, scale)
    for norm in norms:
        if norm not in _head_norms(ways[0], norms).values():
            return f"{norm.path}, a norm {_where(norm, ways[0], o)}"
    if layer.rotation is None:
        return NO_POSITIONS
    return (
        f"attention that is not softmax(scale · q kᵀ) v of heads that turn {', '.join(ROTATIONS)}, causal or with the "
        f"config's window ({shapes})"
    )


def _ways(inner: list[Call], heads: int, size: int) -> Iterator[Heads]:
    """q, k and v among three projections, or among the rows of one."""
    if any(call.result.shape[-1] % size for call in inner):
        return
    split = [(call.path, call.result.unflatten(-1, (-1, size))) for call in inner]
    if len(split) == 3:
        for (q, q_BTHK), (k, k_BTGK), (v, v_BTGK) in permutations(split):
            if q_BTHK.shape[-2] == heads and k_BTGK.shape == v_BTGK.shape:
                yield Heads(q_BTHK, k_BTGK, v_BTGK, {"q": q, "k": k, "v": v})
    elif len(split) == 1:
        yield from _rows(*split[0], heads)


def _rows(path: str, fused: Tensor, heads: int) -> Iterator[Heads]:
    """q, k and v [B, T, heads, K] in every order of one projection's rows; the order that descriptions say first."""
    groups, odd = divmod(fused.shape[-2] - heads, 2)
    if odd or groups < 1:
        return
    paths = {"qkv": path}
    for order in permutations("qkv"):
        parts = fused.split([heads if each == "q" else groups for each in order], dim=-2)
        named = dict(zip(order, parts, strict=True))
        said = None if order == ("q", "k", "v") else f"all of {', then '.join(order)}"
        yield Heads(named["q"], named["k"], named["v"], paths, said)
    if not heads % groups:
        together = fused.unflatten(-2, (groups, -1)).split([heads // groups, 1, 1], dim=-2)
        q, k, v = (x.flatten(-3, -2) for x in together)
        yield Heads(q, k, v, paths, "q, k and v of one head after the other")


def _computed(
    reading: Reading,
    layer: Layer,
    attention: Call,
    way: Heads,
    norms: dict[str, Call],
    given: Tensor,
) -> Iterator[tuple[str, float]]:
    """The rotations and scales with which attention gives what the output projection was given."""
    q, k = (
        norms[role].result if role in norms else x
        for role, x in (("q_norm", way.q), ("k_norm", way.k))
    )
    q, k = _arranged(q, way.q), _arranged(k, way.k)
    if q is None or k is None:
        return
    batch, length, _, size = q.shape
    softcap = reading.config.get(reading.keys.get("attention_softcap", ""))
    sequences = Sequences.dense(batch, length, "cpu")
    scales = {getattr(attention.module, name, None) for name in ("scaling", "scale")}
    for rotation in (*ROTATIONS, IN_TURN):
        turned = _turned(q.flatten(0, 1), k.flatten(0, 1), layer, rotation)
        if turned is None:
            continue
        for scale in sorted({s for s in scales if isinstance(s, float)} | {size**-0.5}):
            for window in (None, reading.config.get(reading.keys.get("window", ""))):
                o, _ = Reference().forward(
                    *turned,
                    way.v.flatten(0, 1),
                    sequences,
                    scale=scale,
                    window=window,
                    softcap=softcap,
                )
                if same(o.reshape(given.shape), given):
                    yield rotation, scale


def _turned(
    q_THK: Tensor, k_TGK: Tensor, layer: Layer, rotation: str
) -> tuple[Tensor, Tensor] | None:
    """None where the layer was given no rotation."""
    if rotation == NOT_AT_ALL:
        return q_THK, k_TGK
    if layer.rotation is None:
        return None
    tables = [x.reshape(-1, x.shape[-1]) for x in layer.rotation]
    if rotation == IN_TURN:
        tables = [x[:, ::2].repeat(1, 2) for x in tables]
    interleaved = rotation == IN_TURN or "interleaved" in ROTATIONS[rotation]
    return rope.forward(q_THK, k_TGK, *tables, interleaved=interleaved)


def _arranged(x: Tensor, like: Tensor) -> Tensor | None:
    """A norm's tensor as [B, T, heads, K], whichever way it lies; None where it cannot be that."""
    if x.numel() != like.numel() or x.dim() < 3:
        return None
    if x.dim() == 4 and x.shape[1] == like.shape[2] and x.shape[2] == like.shape[1]:
        x = x.transpose(1, 2)
    return x.reshape(like.shape)


def _head_norms(way: Heads, norms: list[Call]) -> dict[str, Call]:
    """The norms over q and k as they were projected, by role."""
    roles: dict[str, Call] = {}
    for norm in norms:
        for role, x in (("q_norm", way.q), ("k_norm", way.k)):
            given = _arranged(norm.given, x)
            if given is not None and same(given, x):
                roles[role] = norm
    return roles


def _where(norm: Call, way: Heads, o: Call) -> str:
    """Where a norm stands that is not over q or k as they were projected."""
    if same(norm.result.reshape(-1), o.given.reshape(-1)):
        return "between the heads and their output projection"
    values = _arranged(norm.given, way.v)
    if values is not None and same(values, way.v):
        return "over v"
    for x in (way.q, way.k):
        given = _arranged(norm.given, x)
        if given is not None and same(given.norm(dim=-1), x.norm(dim=-1)):
            return "behind the rotation, not before it"
    return "that is over neither q nor k as they were projected"


def _read_head_norms(reading: Reading, found: Found) -> None:
    over: set[str] = set()
    for role, call in found.norms.items():
        kind = norm_kind(call)
        layers = (reading.norms.get("kind"), reading.norms.get("offset"))
        if kind is None or kind[:2] != layers:
            reading.missing.append(f"{call.path}, a norm of another kind than the layer's")
        over.add("head" if call.given.shape[-1] == found.heads.q.shape[-1] else "all")
        reading.paths[role] = call.path
    if len(over) > 1:
        reading.missing.append("norms over each head of one and all heads of the other of q and k")
    elif over == {"all"}:
        reading.heads["norm_over"] = "all"


def _name_scale(reading: Reading, found: Found) -> None:
    size = found.heads.q.shape[-1]
    config: Any = reading.config
    usual = config.get("head_dim") or reading.model.config.hidden_size // found.heads.q.shape[-2]
    if size != usual:
        reading.missing.append(f"heads of {size} where the config says {usual}")
    if abs(found.scale - size**-0.5) > CLOSE:
        if reading.key_with(found.scale**-2) is not None:
            reading.keys["query_scale"] = reading.key_with(found.scale**-2)
        else:
            reading.name("attention_scale", found.scale, "the attention scale")
