"""GB/s of rms_norm, rope and glu against eager, torch.compile and Liger, on one GPU.

    python benchmarks/op_elementwise.py                        three models, 16,384 tokens
    python benchmarks/op_elementwise.py --models llama --no-compile

Each op is checked against fp64 truth before it is timed; nothing is timed that is worse than eager.
torch.compile runs on the first model named.
Hotloop's rows time what a block calls: forward and backward of the implementation, in place where a
block works in place. The others run through autograd, which is all they offer; launch overhead is
hidden for all alike.
One JSON line a row; `share_of_copy` is against the copy rate measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
import torch._functorch.config
import torch.nn.functional as F
from hotloop_core.kernels import Activation, HeadNorm
from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.glu import glu
from hotloop_engine.ops.rms_norm import rms_norm
from hotloop_engine.ops.rope import rope
from hotloop_testkit.numerics import assert_no_worse_than
from measure import DEVICE, SMOKE, arguments, parsed, rotation, time_for, time_in_turn, write_row
from torch import Tensor

DTYPE = torch.bfloat16
EPS = 1e-6
CHECKED_TOKENS = 8 if SMOKE else 1000

Outputs = tuple[Tensor, ...]
Op = Callable[..., Outputs]


@dataclass(frozen=True)
class Model:
    """The sizes that elementwise ops see: D hidden, I intermediate, H and G heads of K."""

    D: int
    I: int  # noqa: E741 - the design's shape suffix
    H: int
    G: int
    K: int
    activation: Activation = "silu"
    offset: float = 0.0


MODELS = {
    "llama": Model(D=4096, I=14336, H=32, G=8, K=128),
    "qwen": Model(D=3584, I=18944, H=28, G=4, K=128),
    "gemma": Model(D=3584, I=14336, H=16, G=8, K=256, activation="gelu_tanh", offset=1.0),
}
TINY = {name: replace(m, D=64, I=96, H=4, G=2, K=16) for name, m in MODELS.items()}


@dataclass(frozen=True)
class Case:
    """One op in one mode: what must move, and who moves it."""

    op: str
    mode: str
    shape: dict[str, int | str]
    bytes_moved: int
    variants: dict[str, Callable[[int], object]]


def random(*size: int) -> Tensor:
    """Normal bf16 numbers on the device."""
    return torch.randn(*size, device=DEVICE, dtype=DTYPE)


def eager_norm(x: Tensor, w: Tensor, *, offset: float) -> Outputs:
    """Llama's RMSNorm as in transformers, and Gemma's for offset 1."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return ((normed * (1.0 + w.to(wide.dtype))).to(x.dtype) if offset else w * normed.to(x.dtype),)


def eager_add_norm(x: Tensor, r: Tensor, w: Tensor, *, offset: float) -> Outputs:
    """The residual add and the norm of the sum; returns both."""
    s = x + r
    return (*eager_norm(s, w, offset=offset), s)


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
    """Llama's rotation as in transformers, on [T, heads, K]."""

    def one(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    return one(q), one(k)


def eager_normed_rope(
    q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor
) -> Outputs:
    """Qwen3's: RMSNorm over each head, then the rotation."""
    q, k = eager_norm(q, wq, offset=0.0)[0], eager_norm(k, wk, offset=0.0)[0]
    return eager_rope(q, k, cos, sin)


def eager_glu(gate: Tensor, up: Tensor, *, activation: Activation) -> Outputs:
    """The gate as in transformers' MLPs."""
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (act * up,)


def check(ours: Op, eager: Op, inputs: Sequence[Tensor], constants: Sequence[Tensor] = ()) -> None:
    """Raises unless outputs and the gradients of all `inputs` are no worse than eager's."""

    def results(op: Op, dtype: torch.dtype) -> dict[str, Tensor | None]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        outs = op(*leaves, *(t.to(dtype) for t in constants))
        torch.manual_seed(0)
        grads = [torch.randn(o.shape, device=DEVICE, dtype=DTYPE).to(dtype) for o in outs]
        found = (*outs, *torch.autograd.grad(outs, leaves, grads))
        return {str(i): t for i, t in enumerate(found)}

    assert_no_worse_than(results(ours, DTYPE), results(eager, DTYPE), results(eager, torch.float64))


def forwards(
    ops: dict[str, Op], sets: Sequence[Sequence[Tensor]], wrt: Sequence[int]
) -> dict[str, Callable]:
    """Each op's forward as training runs it, saving for backward."""
    own = [[t.detach().requires_grad_(i in wrt) for i, t in enumerate(s)] for s in sets]
    return {name: lambda n, op=op: op(*own[n % len(own)]) for name, op in ops.items()}


def backwards(
    ops: dict[str, Op], inputs: Sequence[Tensor], wrt: Sequence[int]
) -> dict[str, Callable]:
    """Each op's backward through autograd, on copies of its own: Liger overwrites its inputs."""
    works = {}
    for name, op in ops.items():
        own = [t.detach().clone().requires_grad_(i in wrt) for i, t in enumerate(inputs)]
        outs = op(*own)
        works[name] = partial(_grad, outs, [own[i] for i in wrt], [random(*o.shape) for o in outs])
    return works


def _grad(outs: Outputs, wrt: list[Tensor], grads: list[Tensor], _: int) -> Outputs:
    return torch.autograd.grad(outs, wrt, grads, retain_graph=True)


def rivals(eager: Op, liger: Op, options: argparse.Namespace) -> dict[str, Op]:
    """Eager and, where they can run, torch.compile and Liger."""
    found = {"eager": eager}
    if options.compile and not SMOKE:
        found["compile"] = torch.compile(eager, dynamic=False)
    if DEVICE.type == "cuda" and find_spec("liger_kernel"):
        found["liger"] = liger
    return found


def norm_cases(model: Model, T: int, options: argparse.Namespace) -> Iterator[Case]:
    """RMSNorm, alone and after the residual add; backward with the weight frozen and trained."""
    D, offset = model.D, model.offset
    casting = "gemma" if offset else "llama"
    shape: dict[str, int | str] = {"T": T, "D": D, "offset": int(offset)}

    def liger_norm(x: Tensor, w: Tensor) -> Outputs:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return (LigerRMSNormFunction.apply(x, w, EPS, offset, casting, False),)

    def liger_add_norm(x: Tensor, r: Tensor, w: Tensor) -> Outputs:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, offset, casting, False)

    alone, added = partial(eager_norm, offset=offset), partial(eager_add_norm, offset=offset)
    small = [random(CHECKED_TOKENS, D), random(CHECKED_TOKENS, D), random(D)]
    check(lambda x, w: (rms_norm(x, w, eps=EPS, offset=offset),), alone, small[1:])
    check(
        lambda x, r, w: rms_norm(x, w, eps=EPS, offset=offset, residual=r),
        added,
        small,
    )
    op = implementation("rms_norm", DEVICE)
    row = T * D * DTYPE.itemsize
    sets = rotation(lambda: (random(T, D), random(T, D), random(D)), 3 * row)
    x, r, w = sets[0]
    _, rstd, _ = op.forward(x, w, eps=EPS, offset=offset)

    def forward(n: int, *, add: bool) -> object:
        x, r, w = sets[n % len(sets)]
        return op.forward(x, w, eps=EPS, offset=offset, residual_TD=r if add else None)

    def backward(n: int, *, later: Tensor | None = None, dw: bool = False) -> object:
        dy, s, w = sets[n % len(sets)]
        return op.backward(dy, s, w, rstd, offset=offset, dresidual_TD=later, need_dw=dw)

    pairs = [(x, w) for x, _, w in sets]
    plain, fused = rivals(alone, liger_norm, options), rivals(added, liger_add_norm, options)
    with_later = partial(backward, later=random(T, D))
    trained = {name: rival for name, rival in plain.items() if name != "compile"}
    for mode, passes, mine, others in (
        ("forward", 2, partial(forward, add=False), forwards(plain, pairs, (0,))),
        ("forward, residual", 4, partial(forward, add=True), forwards(fused, sets, (0, 1))),
        ("backward", 3, backward, backwards(plain, (x, w), (0,))),
        ("backward, dw", 3, partial(backward, dw=True), backwards(trained, (x, w), (0, 1))),
        ("backward, residual", 4, with_later, backwards(fused, (x, r, w), (0, 1))),
    ):
        yield Case("rms_norm", mode, shape, passes * row, {"hotloop": mine} | others)


def rope_cases(model: Model, T: int, options: argparse.Namespace) -> Iterator[Case]:
    """The rotation of q and k, and the same after an RMSNorm over each head."""
    H, G, K = model.H, model.G, model.K
    shape: dict[str, int | str] = {"T": T, "H": H, "G": G, "K": K}
    angles = torch.arange(T, device=DEVICE)[:, None] * 1e4 ** (
        -torch.arange(0, K, 2, device=DEVICE) / K
    )
    cos, sin = (f(angles).repeat(1, 2).to(DTYPE) for f in (torch.cos, torch.sin))

    def make(tokens: int) -> tuple[Tensor, Tensor]:
        qkv = random(tokens, (H + 2 * G) * K)  # as the grouped projection leaves them
        q, k = qkv[:, : H * K], qkv[:, H * K : (H + G) * K]
        return q.view(tokens, H, K), k.view(tokens, G, K)

    def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        from liger_kernel.ops.rope import LigerRopeFunction

        heads_first = (t.transpose(0, 1)[None] for t in (q, k))
        return LigerRopeFunction.apply(*heads_first, cos[None], sin[None])

    few = (cos[:CHECKED_TOKENS], sin[:CHECKED_TOKENS])
    w = random(K)
    norm = HeadNorm(w_K=w, eps=EPS)
    check(rope, eager_rope, make(CHECKED_TOKENS), few)

    def ours(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        q_norm, k_norm = HeadNorm(w_K=wq, eps=EPS), HeadNorm(w_K=wk, eps=EPS)
        return rope(q, k, cos, sin, q_norm=q_norm, k_norm=k_norm)

    check(ours, eager_normed_rope, (*make(CHECKED_TOKENS), w, random(K)), few)

    op = implementation("rope", DEVICE)
    heads, tables = T * (H + G) * K * DTYPE.itemsize, 2 * T * K * DTYPE.itemsize
    sets = rotation(lambda: (*make(T), cos, sin), heads)
    norms = {"q_norm": norm, "k_norm": norm}

    def in_place(n: int, *, call: Callable[..., object]) -> object:
        q, k, *_ = sets[n % len(sets)]
        return call(q, k, cos, sin, out_q=q, out_k=k)

    def normed_forward(n: int) -> object:
        q, k, *_ = sets[n % len(sets)]
        return op.forward(q, k, cos, sin, **norms)

    gradients = (random(T, H, K), random(T, G, K))

    def normed_backward(n: int, *, dw: bool) -> object:
        q, k, *_ = sets[n % len(sets)]
        forward_inputs = {"q_THK": q, "k_TGK": k}
        return op.backward(*gradients, cos, sin, **forward_inputs, **norms, need_dw=dw)

    others = rivals(eager_rope, liger_rope, options)
    own_sets = [[t.clone() for t in inputs] for inputs in sets]  # Liger rotates in place
    for mode, passes, mine, rival in (
        ("forward", 2, partial(in_place, call=op.forward), forwards(others, own_sets, (0, 1))),
        ("backward", 2, partial(in_place, call=op.backward), backwards(others, sets[0], (0, 1))),
        ("normed forward", 2, normed_forward, {}),
        ("normed backward", 3, partial(normed_backward, dw=False), {}),
        ("normed backward, dw", 3, partial(normed_backward, dw=True), {}),
    ):
        yield Case("rope", mode, shape, passes * heads + tables, {"hotloop": mine} | rival)


def glu_cases(model: Model, T: int, options: argparse.Namespace) -> Iterator[Case]:
    """SwiGLU or GeGLU, gate and up side by side in one buffer."""
    width, activation = model.I, model.activation
    shape: dict[str, int | str] = {"T": T, "I": width, "activation": activation}

    def liger_glu(gate: Tensor, up: Tensor) -> Outputs:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        function = LigerSiLUMulFunction if activation == "silu" else LigerGELUMulFunction
        return (function.apply(gate, up),)

    def make() -> tuple[Tensor, Tensor]:
        gate, up = random(T, 2 * width).split(width, dim=-1)
        return gate, up

    eager = partial(eager_glu, activation=activation)
    gate, up = make()
    few = (gate[:CHECKED_TOKENS], up[:CHECKED_TOKENS])
    check(lambda gate, up: (glu(gate, up, activation=activation),), eager, few)
    op = implementation("glu", DEVICE)
    h, dh = random(T, width), random(T, width)
    tensor = T * width * DTYPE.itemsize
    others = rivals(eager, liger_glu, options)
    apart = [(gate.contiguous(), up.contiguous())]

    def forward(_: int) -> object:
        return op.forward(gate, up, activation=activation, out=h)

    yield Case(
        "glu", "forward", shape, 3 * tensor, {"hotloop": forward} | forwards(others, apart, (0, 1))
    )

    def backward(_: int) -> object:
        return op.backward_(dh, gate, up, activation=activation)

    # The others do not give h again: they write two tensors, not three, and move five.
    rival = backwards(others, apart[0], (0, 1))
    yield Case("glu", "backward", shape, 5 * tensor, rival)
    yield Case("glu", "backward with h", shape, 6 * tensor, {"hotloop": backward})


def main() -> None:
    """Checks, times and prints."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parsed(parser)
    models, tokens = (TINY, 16) if SMOKE else (MODELS, options.tokens)
    torch._functorch.config.donated_buffer = False  # the timed backwards retain their graph
    for name in options.models:
        torch._dynamo.reset()  # its cache is per function, and would fill up over three models
        for cases in (norm_cases, rope_cases, glu_cases):
            if not time_for(f"{cases.__name__} of {name}"):
                continue
            for case in cases(models[name], tokens, options):
                for variant, timing in time_in_turn(case.variants).items():
                    write_row(
                        op=case.op,
                        mode=case.mode,
                        variant=variant,
                        shape={"model": name, **case.shape},
                        dtype=DTYPE,
                        timing=timing,
                        bytes_moved=case.bytes_moved,
                    )
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
        options.compile = False  # half a minute a model, and it says the same of each


if __name__ == "__main__":
    main()
