"""TFLOP/s of every attention backend of this card, checked against truth before it is timed.

    python benchmarks/op_attention.py            the shapes of Llama-3-8B, 8 x 2048 to 1 x 32768
    python benchmarks/op_attention.py --gemma2   soft cap and windows, heads of 256

Each backend runs forward and backward, the backward also under its deterministic switch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from hotloop_engine.attention import Sequences, request
from hotloop_engine.attention.backends import BACKENDS
from hotloop_engine.attention.backends.triton import Triton
from hotloop_engine.attention.reference import Reference
from hotloop_testkit.numerics import relative_error
from measure import peak_bytes, time_in_turn, write_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CUDA = torch.device("cuda", 0)
NO_WORSE_THAN = 8e-3  # relative error in bf16; eager's is between 3e-3 and 8e-3


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
    wide = torch.randn(tokens, sum(columns), device=CUDA, dtype=dtype)
    parts = [part.unflatten(1, (-1, k)) for part in wide.split(columns, dim=1)]
    return [*parts, torch.randn(tokens, shape.heads, k, device=CUDA, dtype=dtype)]


def gate(shape: Shape, name: str, found: list[Tensor], truth: list[Tensor]) -> None:
    """Raises where a result is further from truth than 16-bit rounding explains."""
    errors = [relative_error(x, exact) for x, exact in zip(found, truth, strict=True)]
    if not max(errors) <= NO_WORSE_THAN:
        raise SystemExit(f"{name} on {shape.name} is wrong: errors of o, dq, dk, dv are {errors}")


def main() -> None:
    """Checks, times and prints one JSON line for each backend, pass and shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gemma2", action="store_true")
    for shape in GEMMA2 if parser.parse_args().gemma2 else LLAMA:
        measure(shape, torch.bfloat16)


def exact(inputs: tuple[Tensor, ...], sequences: Sequences, options: dict) -> list[Tensor]:
    """Returns o, dq, dk, dv from the fp64 reference, or from fp32 where its scores would not fit.

    The fp32 ones are our kernel's, which the shorter shapes of the same run hold against fp64.
    """
    fits = sequences.longest <= 4096
    judge, dtype = (Reference(), torch.float64) if fits else (Triton(), torch.float32)
    q, k, v, do = (x.to(dtype) for x in inputs)
    o, lse = judge.forward(q, k, v, sequences, **options)
    return [o, *judge.backward(do, q, k, v, o, lse, sequences, **options)]


def measure(shape: Shape, dtype: torch.dtype) -> None:
    """All that can run this shape, in turn."""
    q, k, v, do = tensors(shape, dtype)
    offsets = torch.tensor([0, *accumulate(shape.lengths)], device=CUDA)
    sequences = Sequences.from_cu_seqlens(offsets, tokens=sum(shape.lengths))
    options = {
        "scale": shape.head_size**-0.5,
        "window": shape.window,
        "softcap": shape.softcap,
    }
    truth = exact((q, k, v, do), sequences, options)
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
            if reason := backend.refusal(asked, CUDA):
                print(f"# {shape.name} {name}: {reason}", flush=True)
                continue
            chosen = {**options, "deterministic": deterministic}
            o, lse = backend.forward(q, k, v, sequences, **chosen)

            def ahead(_: int, backend=backend, chosen=chosen) -> object:
                return backend.forward(q, k, v, sequences, **chosen)

            def back(_: int, backend=backend, chosen=chosen, o=o, lse=lse) -> object:
                return backend.backward(do, q, k, v, o, lse, sequences, **chosen)

            found = [o, *back(0)]
            gate(shape, name, found, truth)
            if not deterministic:
                forward[name] = ahead
            backward[name] = back
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
