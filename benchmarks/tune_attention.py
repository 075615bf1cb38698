"""The best tiles of our Triton attention on this card, by head size, for `attention/kernel.py: launches`.

    python benchmarks/tune_attention.py                       heads of 128 and 256, soft cap and window
    python benchmarks/tune_attention.py --head-sizes 64

Each candidate is checked against the one that `launches` has, then timed with the others in turn: one JSON line each,
best first. What cannot be compiled or launched on this card says so and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from hotloop_engine.attention import Sequences, kernel
from hotloop_engine.attention.backends.triton import Triton
from hotloop_engine.attention.kernel import Launches, Tile
from hotloop_testkit.numerics import relative_error
from measure import DEVICE, SMOKE, arguments, parsed, time_for, time_in_turn, write_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ALIKE = 1e-2  # two results in bf16 that differ by their order of summation only

TILES: dict[int, dict[str, list[Tile]]] = {
    64: {
        "forward": [Tile(128, 128, 8, 2), Tile(128, 64, 4, 3)],
        "dkv": [Tile(64, 64, 4, 2), Tile(64, 128, 8, 2)],
        "dq": [Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)],
    },
    128: {
        "forward": [Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)],
        "dkv": [Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(32, 128, 8, 3)],
        "dq": [Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)],
    },
    256: {
        "forward": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
        "dkv": [Tile(32, 32, 4, 2), Tile(32, 64, 4, 2)],
        "dq": [Tile(32, 32, 4, 2), Tile(64, 32, 4, 2)],
    },
}
"""Beside the ones in use."""


@dataclass(frozen=True)
class Problem:
    """One batch, and what attention of it is."""

    inputs: tuple[Tensor, ...]
    sequences: Sequences
    options: dict[str, Any]
    launches: Launches

    def run(self, launches: Launches, *, backward: bool) -> list[Tensor]:
        """One pass under these tiles: o, or dq, dk, dv."""
        q, k, v, do, o, lse = self.inputs
        with mock.patch.object(kernel, "launches", lambda *_: launches):
            if backward:
                return list(Triton().backward(do, q, k, v, o, lse, self.sequences, **self.options))
            return [Triton().forward(q, k, v, self.sequences, **self.options)[0]]


def problem(head_size: int) -> Problem:
    """Two sequences of 4,096 tokens, 16 heads over 8, a window of 2,048 and Gemma 2's cap."""
    length, heads = (24, 2) if SMOKE else (4096, 16)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    tokens = 2 * length
    q, do = (torch.randn(tokens, heads, head_size, device=DEVICE, dtype=dtype) for _ in range(2))
    k, v = (
        torch.randn(tokens, heads // 2, head_size, device=DEVICE, dtype=dtype) for _ in range(2)
    )
    sequences = Sequences.dense(2, length, DEVICE)
    options = {"scale": head_size**-0.5, "window": length // 2, "softcap": 50.0}
    o, lse = Triton().forward(q, k, v, sequences, **options)
    hopper = DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] == 9
    used = kernel.launches(head_size, q.element_size(), hopper)
    return Problem((q, k, v, do, o, lse), sequences, options, used)


def candidates(one: Problem, name: str, head_size: int) -> dict[str, Launches]:
    """The tiles in use, and others for one of the three kernels; dk and dv together and apart."""
    found = {"in use": one.launches}
    for tile in TILES[head_size][name]:
        found[f"{tile}"] = one.launches._replace(**{name: tile})
        if name == "dkv":
            other = not one.launches.apart
            found[f"{tile}, {'apart' if other else 'together'}"] = found[f"{tile}"]._replace(
                apart=other
            )
    return found


def main() -> None:
    """Prints a row for each candidate, best first, by head size and kernel."""
    parser = arguments(__doc__)
    parser.add_argument("--head-sizes", type=int, nargs="+", choices=TILES, default=[128, 256])
    for head_size in parsed(parser).head_sizes:
        one = problem(head_size)
        for name in ("forward", "dkv", "dq"):
            if not time_for(f"{name} of heads of {head_size}"):
                continue
            backward = name != "forward"
            expected = one.run(one.launches, backward=backward)
            variants: dict[str, Callable[[int], object]] = {}
            for label, tiles in candidates(one, name, head_size).items():
                try:
                    found = one.run(tiles, backward=backward)
                except Exception as error:
                    print(f"# {head_size} {name} {label}: {type(error).__name__}: {error}"[:200])
                    continue
                errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
                if max(errors) > ALIKE:
                    print(f"# {head_size} {name} {label}: wrong, {errors}")
                    continue
                variants[label] = lambda _, t=tiles, b=backward, p=one: p.run(t, backward=b)
            timings = time_in_turn(variants, warmup=1, repeats=8)
            for label in sorted(timings, key=lambda label: timings[label].p50_ms):
                write_row(
                    op="attention tiles",
                    mode=name,
                    variant=label,
                    shape={"tokens": one.sequences.tokens, "head_size": head_size},
                    dtype=one.inputs[0].dtype,
                    timing=timings[label],
                )


if __name__ == "__main__":
    main()
