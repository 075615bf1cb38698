"""What the op benchmarks share: interleaved timing, the copy ceiling of this card, and the row.

Variants are timed in turn, round by round, on the same clocks, with inputs rotated so that none of
them still lies in the L2 cache. A script checks each op against truth before it times anything.

Every script takes `--smoke`: tiny shapes on whatever device there is, which shows that it runs to its end. The times of
such a run mean nothing, and its rows say `"smoke": true`. And `--seconds`: it begins nothing new after that time, and
says what it left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import torch
import triton

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Item = TypeVar("Item")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SMOKE = "--smoke" in sys.argv
ROUND_SECONDS = 3.0
"""Of device time for the timed calls of one set of variants; slow ones are called less often for it."""

_began = perf_counter()
_limit: list[float] = []


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser that knows `--smoke`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, any device: does the script run?"
    )
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for; refuses to time anything on a CPU."""
    options = parser.parse_args()
    if options.seconds is not None:
        _limit.append(options.seconds)
    if DEVICE.type == "cpu" and not options.smoke:
        parser.error("found no CUDA device to time; --smoke only shows that the script runs.")
    return options


def time_for(what: str) -> bool:
    """Whether there is time to begin something; says what is left out where there is none."""
    if not _limit or perf_counter() - _began < _limit[0]:
        return True
    print(f"# out of time ({_limit[0]:.0f} s), left out: {what}", flush=True)
    return False


@dataclass(frozen=True)
class Timing:
    """Milliseconds of device time for one call: the 20th, 50th and 80th percentile."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


def rotation(make: Callable[[], Item], bytes_each: int) -> list[Item]:
    """As many sets of inputs as fill the L2 cache four times over, so that each meets it cold."""
    if DEVICE.type == "cpu":
        return [make()]
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(-(-4 * cache_bytes // max(1, bytes_each)))]


def time_in_turn(
    variants: Mapping[str, Callable[[int], object]], *, warmup: int = 4, repeats: int = 24
) -> dict[str, Timing]:
    """Times each variant up to `repeats` times by CUDA events, one call of each per round.

    At least five rounds, and more while they fit into `ROUND_SECONDS`.

    A variant is called with the number of the call, by which it picks its inputs from a `rotation`.
    The device sleeps while a round is queued, so that launching costs nothing that is measured; how
    long is learned from the last warm-up round.
    """
    if DEVICE.type == "cpu":
        return {
            name: _percentiles([_host_ms(work, n) for n in (0, 1)])
            for name, work in variants.items()
        }
    if SMOKE:
        warmup, repeats = 1, 2
    for number in range(warmup):
        torch.cuda.synchronize()
        begin = perf_counter()
        for position, work in enumerate(variants.values()):
            work(number * len(variants) + position)
        host_seconds = perf_counter() - begin
        torch.cuda.synchronize()
        round_seconds = perf_counter() - begin
    repeats = max(min(5, repeats), min(repeats, int(ROUND_SECONDS / round_seconds)))
    sleep_cycles = int(2e9 * min(1.5 * host_seconds, 0.05))  # at most about 2 GHz
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in variants}
    for number in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(sleep_cycles)
        for position, (name, work) in enumerate(variants.items()):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work(number * len(variants) + position)
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: _percentiles([s.elapsed_time(e) for s, e in m]) for name, m in marks.items()}


def _host_ms(work: Callable[[int], object], number: int) -> float:
    begin = perf_counter()
    work(number)
    return 1e3 * (perf_counter() - begin)


def _percentiles(times_ms: Sequence[float]) -> Timing:
    quintiles = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Timing(quintiles[0], statistics.median(times_ms), quintiles[3])


def host_us(work: Callable[[], object], *, repeats: int = 200) -> float:
    """Microseconds of host time that one call takes to launch (median of five blocks of calls)."""
    blocks = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = perf_counter()
        for _ in range(repeats // 5):
            work()
        blocks.append((perf_counter() - begin) / (repeats // 5) * 1e6)
    return statistics.median(blocks)


def peak_bytes(work: Callable[[], object]) -> int:
    """Device bytes that one call allocates at its peak, beyond what is allocated before it; 0 on a CPU."""
    if DEVICE.type == "cpu":
        work()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@cache
def copy_gb_s(gib: float = 1.0) -> float:
    """GB/s (1e9 bytes, read plus written) at which this card copies a large bf16 tensor."""
    source = torch.randn(int(2**10 if SMOKE else gib * 2**29), device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    timing = time_in_turn({"copy": lambda _: target.copy_(source)})["copy"]
    return 2 * source.nbytes / timing.p50_ms / 1e6


@cache
def gemm_tflop_s(size: int = 8192) -> float:
    """TFLOP/s of a square bf16 product on this card, in this run; the median, so with clocks warm."""
    size = 64 if SMOKE else size
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    timing = time_in_turn({"gemm": lambda _: a @ b})["gemm"]
    return 2 * size**3 / timing.p50_ms / 1e9


@cache
def environment() -> dict[str, str]:
    """What makes a row comparable: card, versions, day and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
    }


def write_row(
    *,
    op: str,
    mode: str,
    variant: str,
    shape: Mapping[str, int | str],
    dtype: torch.dtype,
    timing: Timing,
    bytes_moved: int | None = None,
    flops: int | None = None,
    extra: Mapping[str, float | int | str] | None = None,
) -> None:
    """Prints one JSON line.

    With `bytes_moved` it has GB/s and the share of the copy rate measured in this run;
    `bytes_moved` is what must move at the least: every input read once, every output written once.
    """
    row: dict[str, object] = {
        "op": op,
        "mode": mode,
        "variant": variant,
        "shape": dict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "p20_ms": round(timing.p20_ms, 4),
        "p50_ms": round(timing.p50_ms, 4),
        "p80_ms": round(timing.p80_ms, 4),
    }
    if bytes_moved is not None:
        rate = bytes_moved / timing.p50_ms / 1e6
        row |= {
            "gb_s": round(rate, 1),
            "copy_gb_s": round(copy_gb_s(), 1),
            "share_of_copy": round(rate / copy_gb_s(), 3),
        }
    if flops is not None:
        row["tflop_s"] = round(flops / timing.p50_ms / 1e9, 1)
    mark = {"smoke": True} if SMOKE else {}
    print(json.dumps(row | dict(extra or {}) | environment() | mark), flush=True)
