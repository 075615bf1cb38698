"""The suite that an op implementation passes: the laws of `hotloop_core.kernels`, against the engine's reference."""

# ruff: noqa: D102 - the name of a check is its claim
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import Tensor

from .conformance import Conformance, assert_import_is_light, module_of
from .numerics import assert_no_worse_than, poisoned_buffers
from .tiny import assert_same_bits

if TYPE_CHECKING:
    from collections.abc import Callable

SLACK = 0.1
SIZES = [(1, 64), (5, 100), (17, 36)]
"""(tokens, width): one token, and widths that are no power of two."""


class OpConformance(Conformance, kit=True):
    """Checks one implementation of rms_norm, layer_norm, rope, glu, nf4 or linear_cross_entropy.

        class TestMyNorm(OpConformance):
            op, impl, plugin = "rms_norm", "mine", "my-plugin"

    op: what it implements. impl: the name it is registered under. plugin: the entry point that offers it, None for the
    engine's own. device: where to run it.
    """

    op: ClassVar[str]
    impl: ClassVar[str]
    plugin: ClassVar[str | None] = None
    device: ClassVar[str] = "cpu"

    def test_the_plugin_offers_it_and_its_import_is_light(self) -> None:
        from hotloop_core import discover

        assert self.op in CASES, f"the suite has no case for {self.op!r}; it has {list(CASES)}"
        if self.plugin is None:
            return
        assert_import_is_light(module_of(self.plugin))
        offered = {
            (op.op, op.name) for p in discover().plugins if p.name == self.plugin for op in p.ops
        }
        assert (self.op, self.impl) in offered, f"{self.plugin} offers {sorted(offered)}"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("tokens, width", SIZES)
    def test_it_is_no_worse_than_the_reference(self, tokens: int, width: int, dtype: str) -> None:
        inputs = _inputs(tokens, width, getattr(torch, dtype), self.device)
        exact = {name: value.double() for name, value in inputs.items()}
        case, reference = CASES[self.op], self._load("reference")
        with poisoned_buffers():
            ours = case(self._load(self.impl), _clones(inputs), False)
        eager, truth = case(reference, _clones(inputs), False), case(reference, exact, False)
        assert_no_worse_than(ours, eager, truth, slack=SLACK)

    def test_it_gives_the_same_bits_twice(self) -> None:
        inputs = _inputs(7, 36, torch.float32, self.device)
        first, second = (
            CASES[self.op](self._load(self.impl), _clones(inputs), False) for _ in range(2)
        )
        assert_same_bits(second, first)

    def test_strided_inputs_and_buffers_give_the_same_bits_and_nothing_else_is_touched(
        self,
    ) -> None:
        inputs = _inputs(7, 36, torch.float32, self.device)
        plain = CASES[self.op](self._load(self.impl), _clones(inputs), False)
        wide = {name: _strided(value) for name, value in inputs.items()}
        assert_same_bits(CASES[self.op](self._load(self.impl), wide, True), plain)

    def test_no_tokens_are_allowed(self) -> None:
        inputs = _inputs(0, 36, torch.float32, self.device)
        found = CASES[self.op](self._load(self.impl), inputs, False)
        assert all(bool(torch.isfinite(value).all()) for value in found.values())

    def _load(self, impl: str) -> Any:
        from hotloop.wiring import _register_ops  # pyright: ignore[reportPrivateUsage]
        from hotloop_core import discover
        from hotloop_engine.ops._select import implementation

        _register_ops(discover())
        return implementation(self.op, torch.device(self.device), impl)


def _inputs(tokens: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads = {"q": draw(tokens, 3, width), "k": draw(tokens, 1, width)}
    gradients = {"dq": draw(tokens, 3, width), "dk": draw(tokens, 1, width)}
    rows = {name: draw(tokens, width) for name in ("x", "dy", "up")}
    angle = torch.rand(max(tokens, 1), width // 2, generator=generator).repeat(1, 2).to(device)
    tables = {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
    tables = {name: table[:tokens] for name, table in tables.items()}
    return {**rows, **heads, **gradients, **tables, "w": 1 + 0.1 * draw(width), "b": draw(width)}


def _clones(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in inputs.items()}


MARGIN = 4
GUARD = 123.0


def _strided(value: Tensor) -> Tensor:
    """The same values as a view into wider memory; vectors and tables stay as they are."""
    if value.dim() < 2:
        return value.clone()
    room = value.new_full((value.shape[0], value[0].numel() + MARGIN), GUARD)
    view = room[:, : value[0].numel()].unflatten(1, value.shape[1:])
    return view.copy_(value)


def _buffer(like: Tensor, strided: bool) -> tuple[Tensor | None, Callable[[], None]]:
    """An output buffer (None to let the op allocate) and a check that nothing beside it was written."""
    if not strided:
        return None, lambda: None
    view = _strided(torch.full_like(like, float("nan")))
    room = view.as_strided((like.shape[0], view.stride(0)), (view.stride(0), 1))

    def check() -> None:
        assert bool((room[:, -MARGIN:] == GUARD).all()), "written beside the output buffer"

    return view, check


def _norm(op: Any, x: dict[str, Tensor], strided: bool, *, layer: bool) -> dict[str, Tensor]:
    bias = (x["b"],) if layer else ()
    out, check = _buffer(x["x"], strided)
    dx_out, dx_check = _buffer(x["x"], strided)
    y, *statistics, _ = op.forward(x["x"], x["w"], *bias, eps=1e-5, out=out)
    dx, *dw = op.backward(x["dy"], x["x"], x["w"], *statistics, need_dw=True, out=dx_out)
    check()
    dx_check()
    weights = {f"dw{i}": gradient for i, gradient in enumerate(dw) if gradient is not None}
    return {"y": y.contiguous(), "dx": dx.contiguous(), **weights}


def _rms_norm(op: Any, x: dict[str, Tensor], strided: bool) -> dict[str, Tensor]:
    return _norm(op, x, strided, layer=False)


def _layer_norm(op: Any, x: dict[str, Tensor], strided: bool) -> dict[str, Tensor]:
    return _norm(op, x, strided, layer=True)


def _glu(op: Any, x: dict[str, Tensor], strided: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for activation in ("silu", "gelu", "gelu_tanh"):
        out, check = _buffer(x["x"], strided)
        h = op.forward(x["x"], x["up"], activation=activation, out=out)
        check()
        again = _strided if strided else Tensor.clone
        dh, gate, up = again(x["dy"]), again(x["x"]), again(x["up"])
        op.backward_(dh, gate, up, activation=activation)
        values = {"h": h, "h again": dh, "dgate": gate, "dup": up}
        found |= {f"{activation} {name}": value.contiguous() for name, value in values.items()}
    return found


def _rope(op: Any, x: dict[str, Tensor], strided: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for interleaved in (False, True):
        tables = {"interleaved": interleaved}
        out_q, check = _buffer(x["q"], strided)
        q, k = op.forward(x["q"], x["k"], x["cos"], x["sin"], **tables, out_q=out_q)
        dq, dk, *_ = op.backward(x["dq"], x["dk"], x["cos"], x["sin"], **tables)
        check()
        values = {"q": q, "k": k, "dq": dq, "dk": dk}
        found |= {f"{interleaved} {name}": value.contiguous() for name, value in values.items()}
    return found


def _nf4(op: Any, x: dict[str, Tensor], strided: bool) -> dict[str, Tensor]:
    from hotloop_core.kernels import FourBitWeight

    buffer, check = _buffer(x["x"], strided)
    out = torch.empty_like(x["x"]) if buffer is None else buffer  # the one op that never allocates
    device, blocksize, nested_blocksize = out.device, 16, 4
    blocks = -(-out.numel() // blocksize)
    generator = torch.Generator().manual_seed(5)
    # Uneven values, as those of bitsandbytes' tables.
    code = torch.linspace(-1, 1, 16).pow(3).to(device)
    inner = torch.linspace(-1, 1, 256).pow(3).to(device)
    packed, codes = (
        torch.randint(256, (n,), generator=generator, dtype=torch.uint8).to(device)
        for n in (-(-out.numel() // 2), blocks)
    )
    absmax, outer = (
        torch.rand(n, generator=generator).to(device)
        for n in (blocks, -(-blocks // nested_blocksize))
    )
    weight = FourBitWeight(
        packed=packed,
        absmax=absmax,
        code=code,
        blocksize=blocksize,
        shape=(out.shape[0], out.shape[1]),
        dtype=out.dtype,
        kind="nf4",
    )
    nested = replace(
        weight,
        absmax=codes,
        nested_absmax=outer,
        nested_code=inner,
        nested_offset=torch.tensor(0.5, device=device),
        nested_blocksize=nested_blocksize,
    )
    plain = op.forward(weight, out=out).clone()
    check()
    return {"plain": plain, "nested": op.forward(nested, out=out).contiguous()}


def _linear_cross_entropy(op: Any, x: dict[str, Tensor], strided: bool) -> dict[str, Tensor]:
    from hotloop_core.kernels import HeadLossOptions

    tokens, width = x["x"].shape
    wide = torch.float64 if x["x"].dtype == torch.float64 else torch.float32
    labels = torch.arange(tokens, device=x["x"].device) * 7 % width
    dloss, dlog_prob, dentropy = x["dy"][:, :3].to(wide).unbind(1)
    again = _strided if strided else Tensor.clone
    found: dict[str, Tensor] = {}
    for name, options in {
        "plain": HeadLossOptions(),
        "all": HeadLossOptions(
            label_smoothing=0.1, softcap=5.0, scale=1.5, z_loss=0.01, temperature=0.7
        ),
    }.items():
        at_once, later = again(x["x"]), again(x["x"])
        op.forward_(at_once, labels, options=options, dloss_T=dloss, want_entropy=False)
        rows = op.forward_(later, labels, options=options, dloss_T=None, want_entropy=True)
        assert torch.equal(later, x["x"]), "forward_ without dloss_T changed the logits"
        op.backward_(
            later,
            labels,
            rows.lse_T,
            rows.entropy_T,
            options=options,
            dloss_T=dloss,
            dlog_prob_T=dlog_prob,
            dentropy_T=dentropy,
        )
        values = {
            "loss": rows.loss_T,
            "log_prob": rows.log_prob_T,
            "lse": rows.lse_T,
            "is_top1": rows.is_top1_T.to(wide),
            "entropy": rows.entropy_T,
            "dlogits": later,
            "dlogits of the loss": at_once,
        }
        found |= {f"{name} {key}": value.contiguous() for key, value in values.items()}
    scaled = again(x["up"])
    op.scale_rows_(scaled, dloss)
    return {**found, "scaled": scaled.contiguous()}


CASES = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "glu": _glu,
    "nf4": _nf4,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""op -> everything that it computes from the inputs, by name; with strided buffers where asked."""
