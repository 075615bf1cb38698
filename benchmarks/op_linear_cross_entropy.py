"""Loss from hidden states and head: against its own GEMMs, eager, torch.compile and Liger.

    python benchmarks/op_linear_cross_entropy.py

Correct first: loss and gradients on 512 tokens against fp64, beside eager's. Then forward and
backward together, with the peak of memory beyond the inputs and the hidden gradient. The floor is
the GEMMs alone, in the same chunks into the same tile; `share_of_gemms` is floor over time.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from hotloop_core.kernels import HeadLossOptions
from hotloop_engine.ops.linear_cross_entropy import _chunk_tokens, kernel, linear_cross_entropy
from hotloop_testkit.numerics import assert_no_worse_than
from measure import peak_bytes, time_in_turn, write_row

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

DTYPE = torch.bfloat16


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
    Case("qwen2.5-7b", 16384, 152064, 3584),
    Case("gemma-2-9b", 16384, 256000, 3584, softcap=30.0),
)


class Inputs:
    """Leaves for one case. No label is ignored, so that every variant runs the same GEMMs."""

    def __init__(self, case: Case, tokens: int | None = None, dtype: torch.dtype = DTYPE) -> None:
        torch.manual_seed(0)
        tokens = tokens or case.T
        hidden = torch.randn(tokens, case.D, device="cuda", dtype=DTYPE)
        weight = torch.randn(case.V, case.D, device="cuda", dtype=DTYPE) / case.D**0.5
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_(case.train_head)
        self.labels = torch.randint(case.V, (tokens,), device="cuda")

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


def gemms(i: Inputs, case: Case) -> None:
    """The GEMMs of forward and backward alone: z = h W^T, dh = dz W and, trained, dW = dz^T h."""
    chunk = _chunk_tokens(case.T, case.V, DTYPE, None)
    tile = torch.empty(chunk, case.V, device="cuda", dtype=DTYPE)
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
        inputs = Inputs(case, tokens=512, dtype=dtype)
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
    torch.cuda.empty_cache()
    inputs = Inputs(case)
    losses = {"hotloop": ours} | {n: f for n, f in peers.items() if n in case.peers}
    variants: dict[str, Callable[[int], object]] = {"gemms": lambda _: gemms(inputs, case)}
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
                "share_of_gemms": round(timings["gemms"].p50_ms / timing.p50_ms, 3),
                "extra_bytes": peak,
                "gate": "no worse than eager" if name == "hotloop" else "not checked",
            },
        )
    measure_rows(case, inputs)


def measure_rows(case: Case, inputs: Inputs) -> None:
    """The row kernel alone: one read and one write of the tile are what must move."""
    tile = torch.randn(_chunk_tokens(case.T, case.V, DTYPE, None), case.V, device="cuda").to(DTYPE)
    labels = inputs.labels[: len(tile)]
    dloss = torch.ones((), device="cuda").expand(len(tile))
    options = HeadLossOptions(softcap=case.softcap)

    def work(_: int) -> object:
        return kernel.forward_(tile, labels, options=options, dloss_T=dloss, want_entropy=False)

    write_row(
        op="linear_cross_entropy",
        mode="rows",
        variant="hotloop",
        shape={"name": case.name, "T": len(tile), "V": case.V},
        dtype=DTYPE,
        timing=time_in_turn({"rows": work})["rows"],
        bytes_moved=2 * tile.nbytes,
    )


def main() -> None:
    """Every case."""
    peers = {"eager": eager, "torch.compile": torch.compile(eager), "liger": liger}
    if importlib.util.find_spec("liger_kernel") is None:
        print("liger_kernel is not installed; its rows are missing", file=sys.stderr)
        del peers["liger"]
    for case in CASES:
        measure_case(case, peers)


if __name__ == "__main__":
    main()
