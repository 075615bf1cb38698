"""Loss from hidden states and head: against its own GEMMs, eager, torch.compile and Liger.

    python benchmarks/op_linear_cross_entropy.py
    python benchmarks/op_linear_cross_entropy.py --tune     the GEMMs by chunk, the rows by launch

Correct first: loss and gradients on 512 tokens against fp64, beside eager's. Then forward and
backward together, with the peak of memory beyond the inputs and the hidden gradient. Two floors:
`times_gemms` is time over the GEMMs alone, in the same chunks into the same tile;
`times_gemm_rate` over the same flops at the rate of a square product in this run.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

import torch
import torch.nn.functional as F
from hotloop_core.kernels import HeadLossOptions
from hotloop_engine.ops.linear_cross_entropy import kernel, linear_cross_entropy
from hotloop_engine.ops.linear_cross_entropy.chunking import TILE_BYTES, chunk_tokens
from hotloop_testkit.numerics import assert_no_worse_than
from measure import (
    DEVICE,
    SMOKE,
    arguments,
    gemm_tflop_s,
    parsed,
    peak_bytes,
    time_for,
    time_in_turn,
    write_row,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

DTYPE = torch.bfloat16
CHECKED_TOKENS = 8 if SMOKE else 512


@dataclass(frozen=True)
class Case:
    """One head; `peers` are the others that are timed beside the floor and ours."""

    name: str
    T: int
    V: int
    D: int
    train_head: bool = False
    softcap: float | None = None
    peers: tuple[str, ...] = ()


CASES = (
    Case("llama-3-8b", 16384, 128256, 4096, peers=("eager", "torch.compile", "liger")),
    Case("llama-3-8b", 16384, 128256, 4096, train_head=True, peers=("liger",)),
    Case("llama-3-8b", 4096, 128256, 4096, peers=("liger",)),
    Case("qwen2.5-7b", 16384, 152064, 3584, peers=("liger",)),
    Case("gemma-2-9b", 16384, 256000, 3584, softcap=30.0, peers=("liger",)),
)


class Inputs:
    """Leaves for one case. No label is ignored, so that every variant runs the same GEMMs."""

    def __init__(self, case: Case, tokens: int | None = None, dtype: torch.dtype = DTYPE) -> None:
        torch.manual_seed(0)
        tokens = tokens or case.T
        hidden = torch.randn(tokens, case.D, device=DEVICE, dtype=DTYPE)
        weight = torch.randn(case.V, case.D, device=DEVICE, dtype=DTYPE) / case.D**0.5
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_(case.train_head)
        self.labels = torch.randint(case.V, (tokens,), device=DEVICE)

    def clear(self) -> None:
        """Forgets the gradients."""
        self.hidden.grad = self.weight.grad = None


def ours(i: Inputs, case: Case) -> Tensor:
    """Hotloop's loss."""
    options = HeadLossOptions(softcap=case.softcap)
    return linear_cross_entropy(
        i.hidden, i.weight, i.labels, options=options, num_items=len(i.labels)
    )


def eager(i: Inputs, case: Case) -> Tensor:
    """What transformers does: all logits, then in fp32."""
    logits = F.linear(i.hidden, i.weight)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, i.labels)


def liger(i: Inputs, case: Case) -> Tensor:
    """Liger's fused linear cross entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(i.hidden, i.weight, i.labels, softcap=case.softcap)


def gemms(i: Inputs, case: Case, chunk: int) -> None:
    """The GEMMs of forward and backward alone: z = h W^T, dh = dz W and, trained, dW = dz^T h."""
    tile = torch.empty(chunk, case.V, device=DEVICE, dtype=DTYPE)
    dhidden = torch.empty_like(i.hidden)
    with torch.no_grad():
        for start in range(0, case.T, chunk):
            hidden = i.hidden[start : start + chunk]
            logits = tile[: len(hidden)]
            torch.mm(hidden, i.weight.t(), out=logits)
            torch.mm(logits, i.weight, out=dhidden[start : start + chunk])
            if case.train_head:
                torch.mm(logits.t(), hidden)


def check(case: Case) -> None:
    """Raises where our loss or a gradient is further from fp64 than eager's."""
    found: list[dict[str, Tensor | None]] = []
    for loss_of, dtype in ((ours, DTYPE), (eager, DTYPE), (eager, torch.float64)):
        inputs = Inputs(case, tokens=CHECKED_TOKENS, dtype=dtype)
        loss = loss_of(inputs, case)
        loss.backward()
        found.append({"loss": loss, "dhidden": inputs.hidden.grad, "dweight": inputs.weight.grad})
    assert_no_worse_than(*found, floor=1e-4)


def step(loss_of: Callable[[Inputs, Case], Tensor], inputs: Inputs, case: Case) -> None:
    """Forward and backward of one loss, into fresh gradients."""
    inputs.clear()
    loss_of(inputs, case).backward()


def measure_case(case: Case, peers: Mapping[str, Callable[[Inputs, Case], Tensor]]) -> None:
    """Checks ours on one case, then times it with the peers and the floor."""
    check(case)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    inputs = Inputs(case)
    losses = {"hotloop": ours} | {n: f for n, f in peers.items() if n in case.peers}
    chunk = chunk_tokens(case.T, inputs.weight, DTYPE, None)
    variants: dict[str, Callable[[int], object]] = {"gemms": lambda _: gemms(inputs, case, chunk)}
    for name, loss_of in losses.items():
        variants[name] = lambda _, f=loss_of: step(f, inputs, case)
    timings = time_in_turn(variants, warmup=2, repeats=6)
    flops = (6 if case.train_head else 4) * case.T * case.V * case.D
    gradients = inputs.hidden.nbytes + (inputs.weight.nbytes if case.train_head else 0)
    for name, timing in timings.items():
        inputs.clear()
        peak = peak_bytes(lambda work=variants[name]: work(0)) - gradients
        write_row(
            op="linear_cross_entropy",
            mode="fwd+bwd, head trained" if case.train_head else "fwd+bwd, head frozen",
            variant=name,
            shape={"name": case.name, "T": case.T, "V": case.V, "D": case.D},
            dtype=DTYPE,
            timing=timing,
            flops=flops,
            extra={
                "chunk": chunk,
                "times_gemms": round(timing.p50_ms / timings["gemms"].p50_ms, 3),
                "times_gemm_rate": round(timing.p50_ms * gemm_tflop_s() * 1e9 / flops, 3),
                "gemm_tflop_s": round(gemm_tflop_s(), 1),
                "extra_bytes": peak,
                "gate": "no worse than eager" if name == "hotloop" else "not checked",
            },
        )
    if not case.train_head:
        measure_rows(case, inputs, chunk, {"hotloop": (kernel.BLOCK, kernel.NUM_WARPS)})


def measure_rows(
    case: Case, inputs: Inputs, chunk: int, launches: Mapping[str, tuple[int, int]]
) -> None:
    """The row kernel alone: one read and one write of the tile are what must move."""
    labels = inputs.labels[:chunk]
    tile = torch.randn(len(labels), case.V, device=DEVICE).to(DTYPE)
    dloss = torch.ones((), device=DEVICE).expand(len(labels))
    options = HeadLossOptions(softcap=case.softcap)

    def work(_: int, block: int, num_warps: int) -> object:
        with mock.patch.multiple(kernel, BLOCK=block, NUM_WARPS=num_warps):
            return kernel.forward_(tile, labels, options=options, dloss_T=dloss, want_entropy=False)

    variants = {
        name: partial(work, block=block, num_warps=warps)
        for name, (block, warps) in launches.items()
    }
    for name, timing in time_in_turn(variants).items():
        write_row(
            op="linear_cross_entropy",
            mode="rows",
            variant=name,
            shape={"name": case.name, "T": len(tile), "V": case.V},
            dtype=DTYPE,
            timing=timing,
            bytes_moved=2 * tile.nbytes,
        )


def tune_case(case: Case) -> None:
    """The GEMMs by the height of a chunk, and the row kernel by block and warps."""
    inputs = Inputs(case)
    step = 4 if SMOKE else 128
    most = min(case.T, TILE_BYTES // (case.V * DTYPE.itemsize)) // step
    heights = [step * n for n in range(max(1, most // 2), most + 1)]
    timings = time_in_turn(
        {str(rows): lambda _, rows=rows: gemms(inputs, case, rows) for rows in heights},
        warmup=1,
        repeats=3,
    )
    chosen = chunk_tokens(case.T, inputs.weight, DTYPE, None)
    for rows, timing in timings.items():
        write_row(
            op="linear_cross_entropy",
            mode="gemms by chunk" + (", as chosen" if int(rows) == chosen else ""),
            variant=rows,
            shape={"name": case.name, "T": case.T, "V": case.V, "D": case.D},
            dtype=DTYPE,
            timing=timing,
            flops=4 * case.T * case.V * case.D,
        )
    launches = {
        f"block={block} warps={warps}": (block, warps)
        for block, warps in ((2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32))
    }
    measure_rows(case, inputs, chosen, launches)


def main() -> None:
    """Every case."""
    parser = arguments(__doc__)
    parser.add_argument("--tune", action="store_true")
    options = parsed(parser)
    peers = {"eager": eager, "torch.compile": torch.compile(eager), "liger": liger}
    if SMOKE:
        del peers["torch.compile"]
    if DEVICE.type == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        print("liger_kernel is not here; its rows are missing", file=sys.stderr)
        del peers["liger"]
    for case in CASES:
        small = replace(case, T=16, V=101, D=32) if SMOKE else case
        if not time_for(f"{case.name}, {case.T} tokens{', head trained' * case.train_head}"):
            continue
        if not options.tune:
            measure_case(small, peers)
        elif not case.train_head and case.T == CASES[0].T:
            tune_case(small)


if __name__ == "__main__":
    main()
