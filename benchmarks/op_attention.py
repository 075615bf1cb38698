"""TFLOP/s of every attention backend of this card, checked against truth before it is timed.

    python benchmarks/op_attention.py            the shapes of Llama-3-8B and Mistral-7B's window
    python benchmarks/op_attention.py --gemma2   soft cap and windows, heads of 256

Each backend runs forward and backward, the backward also under its deterministic switch. Beside
them FlexAttention, compiled, on dense batches, where a window or a soft cap leaves few to choose from.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from hotloop_engine.attention import Sequences, request
from hotloop_engine.attention.backends import BACKENDS
from hotloop_testkit.numerics import relative_error
from measure import (
    DEVICE,
    SMOKE,
    arguments,
    parsed,
    peak_bytes,
    time_for,
    time_in_turn,
    write_row,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotloop_engine.attention import Backend
    from torch import Tensor

NO_WORSE_THAN = 8e-3  # relative error in bf16; eager's is between 3e-3 and 8e-3
JUDGED_AT_ONCE = 8 if SMOKE else 512  # queries whose scores the judge holds in fp64


@dataclass(frozen=True)
class Shape:
    """A batch of sequences and a layer's options."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    window: int | None = None
    softcap: float | None = None

    @property
    def flops(self) -> int:
        """Of forward: two products of 2 H K multiply-adds for each visible pair of tokens."""
        pairs = 0
        for n in self.lengths:
            w = min(self.window or n, n)
            pairs += w * (w + 1) // 2 + (n - w) * w
        return 4 * self.heads * self.head_size * pairs


RAGGED = (37, 512, 1000, 2048, 3000, 4096, 1691, 4000)
LLAMA = [
    Shape("2x2048", (2048,) * 2),
    Shape("8x2048", (2048,) * 8),
    Shape("ragged16k", RAGGED),
    Shape("1x32768", (32768,)),
    Shape("2x8192w4096", (8192,) * 2, window=4096),
]
TINY = [
    Shape("tiny", (32,) * 2, heads=4, kv_heads=2, head_size=16),
    Shape("tiny ragged", (7, 20, 1), heads=4, kv_heads=2, head_size=16, window=5),
    Shape("tiny capped", (32,) * 2, heads=4, kv_heads=2, head_size=16, softcap=5.0, window=9),
]
GEMMA2 = [
    Shape("8x2048", (2048,) * 8, heads=16, head_size=256, softcap=50.0),
    Shape("ragged16k", RAGGED, heads=16, head_size=256, softcap=50.0),
    Shape("2x8192w4096", (8192,) * 2, heads=16, head_size=256, softcap=50.0, window=4096),
]


def tensors(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Returns q, k, v as columns of one buffer, as the attention block has them, and do."""
    tokens, k = sum(shape.lengths), shape.head_size
    columns = [shape.heads * k, shape.kv_heads * k, shape.kv_heads * k]
    wide = torch.randn(tokens, sum(columns), device=DEVICE, dtype=dtype)
    parts = [part.unflatten(1, (-1, k)) for part in wide.split(columns, dim=1)]
    return [*parts, torch.randn(tokens, shape.heads, k, device=DEVICE, dtype=dtype)]


def gate(shape: Shape, name: str, found: list[Tensor], truth: list[Tensor]) -> None:
    """Raises where a result is further from truth than 16-bit rounding explains."""
    errors = [relative_error(x, exact) for x, exact in zip(found, truth, strict=True)]
    if not max(errors) <= NO_WORSE_THAN:
        raise AssertionError(f"wrong: relative errors of o, dq, dk, dv are {errors}")


def main() -> None:
    """Checks, times and prints one JSON line for each backend, pass and shape."""
    parser = arguments(__doc__)
    parser.add_argument("--gemma2", action="store_true")
    options = parsed(parser)
    for shape in TINY if SMOKE else GEMMA2 if options.gemma2 else LLAMA:
        # Triton's interpreter multiplies bf16 wrongly, and runs on a CPU only.
        if time_for(shape.name):
            measure(shape, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    sys.exit("\n".join(failures) or None)


class Flex:
    """torch's FlexAttention on a dense batch: a mask of blocks, compiled, gradients by autograd."""

    def __init__(self, shape: Shape, sequences: Sequences, scale: float) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.batch, self.length = sequences.count, sequences.longest
        window, cap = shape.window or self.length, shape.softcap

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j < window)

        def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

        mask = create_block_mask(visible, None, None, self.length, self.length, device=DEVICE)
        run = flex_attention if SMOKE else torch.compile(flex_attention, dynamic=False)
        self.run = lambda q, k, v: run(
            q, k, v,
            score_mod=None if cap is None else capped, block_mask=mask, scale=scale, enable_gqa=True,
        )  # fmt: skip

    def dense(self, x_THK: Tensor) -> Tensor:
        """[B, H, S, K], contiguous, which is what it is fastest on."""
        return x_THK.unflatten(0, (self.batch, self.length)).transpose(1, 2).contiguous()

    def flat(self, x_BHSK: Tensor) -> Tensor:
        """[T, H, K] again."""
        return x_BHSK.transpose(1, 2).flatten(0, 1)


def add_flex(
    shape: Shape, sequences: Sequences, options: dict, inputs: list[Tensor], truth: list[Tensor]
) -> tuple[Callable[[int], object], Callable[[int], object]] | None:
    """Its forward and backward, checked; None on ragged batches (a mask each) and CPUs (no backward)."""
    if sequences.dense_shape is None or DEVICE.type == "cpu":
        return None
    flex = Flex(shape, sequences, options["scale"])
    q, k, v, do = (flex.dense(x) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = flex.run(*leaves)

    def back(_: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, leaves, do, retain_graph=True)

    gate(shape, "flex", [flex.flat(x) for x in (o, *back(0))], truth)
    return (lambda _: flex.run(*leaves)), back


def exact(
    inputs: tuple[Tensor, ...], sequences: Sequences, shape: Shape, scale: float
) -> list[Tensor]:
    """Returns o, dq, dk, dv in fp64, some queries and the heads of one group at a time: no S x S scores."""
    q_THK, k_TGK, v_TGK, do_THK = (x.double() for x in inputs)
    o_THK, dq_THK = torch.empty_like(q_THK), torch.empty_like(q_THK)
    dk_TGK, dv_TGK = torch.zeros_like(k_TGK), torch.zeros_like(v_TGK)
    group = shape.heads // shape.kv_heads
    for start, stop in sequences.bounds():
        for first in range(start, stop, JUDGED_AT_ONCE):
            last = min(first + JUDGED_AT_ONCE, stop)
            i = torch.arange(first, last, device=DEVICE)[:, None]
            j = torch.arange(start, last, device=DEVICE)
            hidden = (j > i) | (i - j >= (shape.window or stop))
            for g in range(shape.kv_heads):
                rows, seen = (
                    (slice(first, last), slice(g * group, (g + 1) * group)),
                    slice(start, last),
                )
                q, do = q_THK[rows].transpose(0, 1), do_THK[rows].transpose(0, 1)
                k, v = k_TGK[seen, g], v_TGK[seen, g]
                s, slope = scale * q @ k.T, 1.0
                if shape.softcap is not None:
                    bent = torch.tanh(s / shape.softcap)
                    s, slope = shape.softcap * bent, 1 - bent.square()
                p = s.masked_fill_(hidden, float("-inf")).softmax(-1)
                dp = do @ v.T
                ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * slope * scale
                o_THK[rows], dq_THK[rows] = (p @ v).transpose(0, 1), (ds @ k).transpose(0, 1)
                dk_TGK[seen, g] += (ds.mT @ q).sum(0)
                dv_TGK[seen, g] += (p.mT @ do).sum(0)
    return [o_THK, dq_THK, dk_TGK, dv_TGK]


failures: list[str] = []


@contextmanager
def reported(shape: Shape, name: str) -> Iterator[None]:
    """Leaves out of this shape what fails or is wrong, so that one of them does not cost the rows of the others."""
    try:
        yield
    except Exception as error:
        failures.append(f"{name} on {shape.name}: {type(error).__name__}: {error}")
        print("# " + failures[-1].replace("\n", " ")[:400], flush=True)


def passes(
    backend: Backend,
    inputs: list[Tensor],
    sequences: Sequences,
    options: dict,
    deterministic: bool,
) -> tuple[Callable[[int], tuple[Tensor, Tensor]], Callable[[int], tuple[Tensor, ...]]]:
    """A backend's forward and, of one output of it, its backward."""
    q, k, v, do = inputs
    chosen = {**options, "deterministic": deterministic}
    o, lse = backend.forward(q, k, v, sequences, **chosen)

    def ahead(_: int) -> tuple[Tensor, Tensor]:
        return backend.forward(q, k, v, sequences, **chosen)

    def back(_: int) -> tuple[Tensor, ...]:
        return backend.backward(do, q, k, v, o, lse, sequences, **chosen)

    return ahead, back


def measure(shape: Shape, dtype: torch.dtype) -> None:
    """All that can run this shape, in turn."""
    q, k, v, do = tensors(shape, dtype)
    offsets = torch.tensor([0, *accumulate(shape.lengths)], device=DEVICE)
    sequences = Sequences.from_cu_seqlens(offsets, tokens=sum(shape.lengths))
    options = {
        "scale": shape.head_size**-0.5,
        "window": shape.window,
        "softcap": shape.softcap,
    }
    truth = exact((q, k, v, do), sequences, shape, options["scale"])
    forward: dict[str, Callable[[int], object]] = {}
    backward: dict[str, Callable[[int], object]] = {}
    for backend in BACKENDS:
        if backend.name == "reference":
            continue
        for deterministic in (False, True):
            asked = request(
                q, k, sequences,
                window=shape.window, softcap=shape.softcap, deterministic=deterministic,
            )  # fmt: skip
            name = backend.name + (" deterministic" if deterministic else "")
            if reason := backend.refusal(asked, DEVICE):
                print(f"# {shape.name} {name}: {reason}", flush=True)
                continue
            with reported(shape, name):
                ahead, back = passes(backend, [q, k, v, do], sequences, options, deterministic)
                gate(shape, name, [ahead(0)[0], *back(0)], truth)
                if not deterministic:
                    forward[name] = ahead
                backward[name] = back
    if shape.window or shape.softcap:
        with reported(shape, "flex"):
            flex = add_flex(shape, sequences, options, [q, k, v, do], truth)
            if flex is not None:
                forward["flex"], backward["flex"] = flex
    sizes = {
        "tokens": sequences.tokens,
        "sequences": sequences.count,
        "longest": sequences.longest,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_size": shape.head_size,
        "window": shape.window or 0,
        "softcap": str(shape.softcap),
    }
    for mode, variants, flops in (
        ("fwd", forward, shape.flops),
        ("bwd", backward, shape.flops * 5 // 2),
    ):
        for name, timing in time_in_turn(variants).items():
            write_row(
                op="attention",
                mode=mode,
                variant=name,
                shape=sizes,
                dtype=dtype,
                timing=timing,
                flops=flops,
                extra={"peak_bytes": peak_bytes(lambda work=variants[name]: work(0))},
            )


if __name__ == "__main__":
    main()
