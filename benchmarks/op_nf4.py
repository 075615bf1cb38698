"""4-bit dequantisation into a wide buffer: both table lookups, launch sizes, bitsandbytes, torch.

    python benchmarks/op_nf4.py [--tune]

Correct first: every variant is compared bit for bit with bitsandbytes. One JSON line per row. The
bytes that must move are the packed weight, its scales and the 16-bit result.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import bitsandbytes.functional as bnb
import torch
from hotloop_engine.ops.nf4 import from_bitsandbytes, kernel, reference
from measure import DEVICE, SMOKE, arguments, parsed, rotation, time_for, time_in_turn, write_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotloop_core.kernels import FourBitWeight
    from torch import Tensor

SHAPES = {
    "llama-3-8b gate": (14336, 4096),
    "llama-3-8b down": (4096, 14336),
    "llama-3-8b q": (4096, 4096),
    "llama-3-8b k": (1024, 4096),
    "qwen2.5-7b gate": (18944, 3584),
    "gemma-2-9b gate": (14336, 3584),
}
DTYPE = (
    torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
)  # Triton's interpreter truncates bf16
SPARE = 64  # columns beside the weight, as a LoRA of rank 16 to 64 takes


class Quantised:
    """What `Params4bit` looks like to `from_bitsandbytes`, and a corner of a wide buffer."""

    def __init__(self, rows: int, columns: int) -> None:
        values = torch.randn(rows, columns, device=DEVICE, dtype=DTYPE)
        self.data, self.quant_state = bnb.quantize_4bit(
            values, quant_type="nf4", compress_statistics=True
        )
        self.weight: FourBitWeight = from_bitsandbytes(self)
        self.wide = torch.empty(rows + SPARE, columns + SPARE, device=DEVICE, dtype=values.dtype)
        self.out = self.wide[:rows, :columns]


def ours(item: Quantised, lookup: str, words: int, num_warps: int) -> Tensor:
    """Our kernel with these launch numbers."""
    with mock.patch.multiple(kernel, WORDS=words, NUM_WARPS=num_warps):
        return kernel.forward(item.weight, out=item.out, lookup=lookup)


def peers() -> dict[str, Callable[[Quantised], Any]]:
    """What others offer; bitsandbytes writes a tensor of its own."""
    found = {
        "bitsandbytes": lambda i: bnb.dequantize_4bit(i.data, i.quant_state),
        "eager": lambda i: reference.forward(i.weight, out=i.out),
    }
    if not SMOKE:
        compiled = torch.compile(reference.forward, dynamic=False)
        found["torch.compile"] = lambda i: compiled(i.weight, out=i.out)
    return found


def hotloop(tune: bool) -> dict[str, Callable[[Quantised], Any]]:
    """Both lookups, with the kernel's launch numbers or with several."""
    launches = [(kernel.WORDS, kernel.NUM_WARPS)]
    if tune:
        launches = [(256, 4), (512, 4), (1024, 4), (2048, 4), (1024, 8), (2048, 8)]
    return {
        f"hotloop {lookup} words={words} warps={warps}": partial(
            ours, lookup=lookup, words=words, num_warps=warps
        )
        for lookup in ("gather", "l1")
        for words, warps in launches
    }


def measure_shape(name: str, chosen: dict[str, Callable[[Quantised], Any]]) -> None:
    """Checks every variant on one shape, then times them in turn."""
    rows, columns = (64, 128) if SMOKE else SHAPES[name]
    values = rows * columns
    must_move = values // 2 + values // 64 + 4 * (values // (64 * 256)) + 2 * values
    items = rotation(partial(Quantised, rows, columns), 5 * values // 2)
    truth = bnb.dequantize_4bit(items[0].data, items[0].quant_state)
    gates = {}
    for variant, work in chosen.items():
        items[0].wide.fill_(float("nan"))
        gates[variant] = "bit-equal" if torch.equal(work(items[0]), truth) else "differs"
        if variant.startswith("hotloop") and gates[variant] != "bit-equal":
            raise SystemExit(f"{variant} on {name} differs from bitsandbytes; nothing timed")
    timings = time_in_turn(
        {v: lambda n, w=work: w(items[n % len(items)]) for v, work in chosen.items()}
    )
    for variant, timing in timings.items():
        write_row(
            op="nf4",
            mode="dequantise",
            variant=variant,
            shape={"name": name, "N": rows, "K": columns},
            dtype=DTYPE,
            timing=timing,
            bytes_moved=must_move,
            extra={"gate": gates[variant]},
        )


def main() -> None:
    """Every shape; eager and torch.compile, which take long, on the first."""
    parser = arguments(__doc__)
    parser.add_argument("--tune", action="store_true", help="try launch sizes, leave peers out")
    tune = parsed(parser).tune
    for number, name in enumerate(SHAPES):
        others = {} if tune else peers()
        if number:
            others = {k: v for k, v in others.items() if k == "bitsandbytes"}
        if time_for(name):
            measure_shape(name, hotloop(tune) | others)


if __name__ == "__main__":
    main()
