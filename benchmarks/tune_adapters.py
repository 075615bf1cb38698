"""The best tiles of the adapters' sums on this card, and how gate and up best make their adapters' input gradient.

    python benchmarks/tune_adapters.py                    an MLP of Llama-3-8B, 4,096 and 16,384 tokens, rank 16

Tiles of `adapter_glu` (the MLP's middle, backward) and of `adapter_gradients` are checked against the reference, then
timed in turn. "dx of gate and up": dt = dy B apart and riding in the GEMM, or dt as further columns of the GEMM and its
product added to dx afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from hotloop_engine.ops.adapter_glu import kernel as middle
from hotloop_engine.ops.adapter_glu import reference as middle_reference
from hotloop_engine.ops.adapter_gradients import kernel as sums
from hotloop_engine.ops.adapter_gradients import reference as sums_reference
from hotloop_engine.ops.adapter_gradients.kernel import Tile
from hotloop_testkit.numerics import relative_error
from measure import DEVICE, SMOKE, arguments, parsed, time_for, time_in_turn, write_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HIDDEN, INTERMEDIATE, RANK = (64, 128, 16) if SMOKE else (4096, 14336, 16)
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
ALIKE = 1e-2

MIDDLE = [
    Tile(rows, columns, warps, stages)
    for rows, columns, warps, stages in (
        *((32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 1), (64, 64, 8, 2)),
        *((64, 64, 8, 3), (32, 128, 8, 1), (32, 128, 8, 3), (64, 128, 8, 1)),
    )
]
SUMS = [
    Tile(rows, columns, 4, stages)
    for rows, columns, stages in (
        *((64, 128, 3), (64, 128, 4), (32, 128, 4), (64, 64, 4), (128, 64, 3), (32, 64, 6)),
    )
]


def random(*shape: int) -> Tensor:
    """Normal values."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(DTYPE)


def tuned(
    op: str,
    tokens: int,
    used: Any,
    tiles: list[Tile],
    run: Callable[[], Tensor],
    expected: Tensor,
    restore: Callable[[], object] = lambda: None,
) -> None:
    """Times `run` under each tile of the module `used`; prints a row each, best first.

    restore: gives `run` its inputs back before its result is checked, where it overwrites them. While it is timed they
    stay overwritten: the bytes are the same.
    """
    variants: dict[str, Callable[[int], object]] = {}

    def under(tile: Tile) -> Tensor:
        with mock.patch.object(used, "TILE", tile):
            return run()

    for tile in tiles:
        restore()
        try:
            error = relative_error(under(tile).sum(0)[:, : expected.shape[1]], expected)
        except Exception as reason:
            print(f"# {op} {tile}: {type(reason).__name__}: {reason}"[:200])
            continue
        if error > ALIKE:
            print(f"# {op} {tile}: wrong, {error}")
            continue
        variants[f"{tuple(tile)}"] = lambda _, t=tile: under(t)
    restore()
    report(op, tokens, variants)


def report(op: str, tokens: int, variants: dict[str, Callable[[int], object]]) -> None:
    """Times variants in turn; prints a row each, best first."""
    timings = time_in_turn(variants, warmup=2, repeats=10)
    for name in sorted(timings, key=lambda name: timings[name].p50_ms):
        write_row(
            op=op,
            mode="backward",
            variant=name,
            shape={"tokens": tokens, "rank": RANK},
            dtype=DTYPE,
            timing=timings[name],
        )


def the_middle(tokens: int) -> None:
    """adapter_glu."""
    wide = random(tokens, 2 * INTERMEDIATE + 64)
    gate, up = wide[:, :INTERMEDIATE], wide[:, INTERMEDIATE : 2 * INTERMEDIATE]
    t, dt, dh = random(tokens, 2 * RANK), random(tokens, RANK), random(tokens, INTERMEDIATE)
    kept = wide.clone()
    expected, _ = middle_reference.backward_(dh.clone(), gate, up, t, dt, activation="silu")
    tuned(
        "adapter_glu",
        tokens,
        middle,
        MIDDLE,
        lambda: middle.backward_(dh, gate, up, t, dt, activation="silu")[0],
        expected.sum(0),
        restore=lambda: wide.copy_(kept),
    )


def the_sums(tokens: int) -> None:
    """adapter_gradients.column_sums of a hidden state."""
    x, t = random(tokens, HIDDEN), random(tokens, RANK)
    expected = sums_reference.column_sums(x, t).sum(0)
    tuned("column_sums", tokens, sums, SUMS, lambda: sums.column_sums(x, t), expected)


def the_input_gradient(tokens: int) -> None:
    """dx of gate and up with their adapters."""
    n, columns = 2 * INTERMEDIATE, 64
    e = random(n + columns, HIDDEN + columns) / HIDDEN**0.5
    dy = random(tokens, n + columns)
    dx = torch.empty(tokens, HIDDEN, device=DEVICE, dtype=DTYPE)
    both = torch.empty(tokens, HIDDEN + columns, device=DEVICE, dtype=DTYPE)

    def riding(_: int) -> None:
        torch.mm(dy[:, :n], e[:n, HIDDEN:], out=dy[:, n:])
        torch.mm(dy, e[:, :HIDDEN], out=dx)

    def beside(_: int) -> None:
        torch.mm(dy[:, :n], e[:n], out=both)
        both[:, :HIDDEN].addmm_(both[:, HIDDEN:], e[n:, :HIDDEN])

    report("dx of gate and up", tokens, {"riding": riding, "beside": beside})


def main() -> None:
    """All of them."""
    parsed(arguments(__doc__))
    for tokens in (64, 128) if SMOKE else (4096, 16384):
        for work in (the_middle, the_sums, the_input_gradient):
            if time_for(f"{work.__name__}, {tokens} tokens"):
                work(tokens)


if __name__ == "__main__":
    main()
