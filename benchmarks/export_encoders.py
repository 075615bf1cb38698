"""GGUF encoders: MB/s of 16-bit input on the CPU, beside ggml's own encoder, and on a GPU where there is one.

    python benchmarks/export_encoders.py [--threads 2] [--rows 1024] [--only gpu] [KIND ...]

Rows are printed, to be appended to history/export_encoders.jsonl.

Correct first: the bytes must be ggml's (or, without llama-cpp-python, those of the CPU) before a time counts. On
the CPU ours and ggml's run in turn on the same threads; `cpu_mb_s` is per second of processor time, which holds on
a machine that others use too. ggml reads float32, ours bfloat16. On a GPU the bytes stay there ("device") or come
to the host ("host"); where there is none, `--only gpu` with few rows shows in Triton's interpreter that it runs.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hotloop_gguf.encoders import encode
from hotloop_gguf.mixes import BLOCKS
from measure import DEVICE, Timing, time_in_turn, write_row

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMNS = 4096
KINDS = [kind for kind in BLOCKS if kind not in ("F32", "F16", "BF16")]
MODULES = ("k_quants", "legacy", "tables")


def ours(x: torch.Tensor, kind: str, importance: torch.Tensor | None) -> bytes:
    """The whole tensor's bytes."""
    return b"".join(bytes(part) for part in encode(x, BLOCKS[kind], kind, importance))


def ggml() -> Any:
    """ggml's `ggml_quantize_chunk`, or None where llama-cpp-python is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    function = library.ggml_quantize_chunk
    wide, pointer = ctypes.c_int64, ctypes.c_void_p
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, pointer, wide, wide, wide, pointer]
    return function


def theirs(
    function: Any, x: torch.Tensor, kind: str, importance: torch.Tensor | None, threads: int
) -> np.ndarray:
    """The same by ggml, rows shared out among threads as llama.cpp's quantiser does."""
    block, rows = BLOCKS[kind], len(x)
    out = np.empty(x.numel() // block.values * block.bytes, np.uint8)
    weights = None if importance is None else importance.data_ptr()

    def share(i: int) -> None:
        first, end = rows * i // threads, rows * (i + 1) // threads
        place = first * x.shape[1]
        function(
            block.number, x.data_ptr(), out.ctypes.data, place, end - first, x.shape[1], weights
        )

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))
    return out


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, seconds of processor time)."""
    begin, begin_cpu = perf_counter(), process_time()
    work()
    return perf_counter() - begin, process_time() - begin_cpu


def on_cpu(kind: str, mode: str, x: torch.Tensor, importance: torch.Tensor | None) -> None:
    """Rows of ours and of ggml's, timed in turn."""
    threads, function, wide = torch.get_num_threads(), ggml(), x.float()
    work: dict[str, Callable[[], object]] = {
        "hotloop": lambda: deque(encode(x, BLOCKS[kind], kind, importance), maxlen=0)
    }
    gate = "no ggml to compare with"
    if function is not None:
        work["ggml"] = lambda: theirs(function, wide, kind, importance, threads)
        same = ours(x, kind, importance) == theirs(function, wide, kind, importance, 1).tobytes()
        gate = "bytes equal" if same else "BYTES DIFFER"
    times = {name: [timed(call) for _ in range(3)] for name, call in work.items()}
    megabytes = x.numel() * 2 / 1e6
    for name, taken in times.items():
        seconds = sorted(wall for wall, _ in taken)
        extra = {
            "mb_s": round(megabytes / median(seconds), 1),
            "cpu_mb_s": round(megabytes / median(cpu for _, cpu in taken), 1),
            "threads": threads,
            "gate": gate,
        }
        timing = Timing(1e3 * seconds[0], 1e3 * median(seconds), 1e3 * seconds[-1])
        write_row(
            op="gguf_encode", mode=f"{kind}{mode}, cpu", variant=name,
            shape={"N": len(x), "K": x.shape[1]}, dtype=x.dtype, timing=timing, extra=extra,
        )  # fmt: skip


def on_gpu(kind: str, mode: str, x: torch.Tensor, importance: torch.Tensor | None) -> None:
    """Rows for a tensor that lies on the device."""
    from hotloop_gguf.encoders import gpu

    there = x.to(DEVICE)
    weights = None if importance is None else importance.to(DEVICE)
    modules = [import_module(f"hotloop_gguf.encoders.{name}") for name in MODULES]
    encoder = next(getattr(m, kind.lower()) for m in modules if hasattr(m, kind.lower()))
    gate = (
        "bytes equal" if ours(there, kind, weights) == ours(x, kind, importance) else "BYTES DIFFER"
    )
    timings = time_in_turn(
        {
            "device": lambda _: encoder(there.float(), weights, gpu.SEARCHES),
            "host": lambda _: ours(there, kind, weights),
        },
        warmup=2,
        repeats=8,
    )
    for name, timing in timings.items():
        rate = x.numel() * 2 / timing.p50_ms / 1e6
        write_row(
            op="gguf_encode", mode=f"{kind}{mode}, gpu", variant=f"hotloop, {name}",
            shape={"N": len(x), "K": x.shape[1]}, dtype=x.dtype, timing=timing,
            extra={"input_gb_s": round(rate, 2), "gate": gate},
        )  # fmt: skip


def main() -> None:
    """Times what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"default: {' '.join(KINDS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1024, help=f"of {COLUMNS} columns")
    parser.add_argument(
        "--only", choices=("cpu", "gpu"), help="default: both, where there is a GPU"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = (torch.randn(options.rows, COLUMNS) * 0.02).bfloat16()
    importance = torch.rand(COLUMNS) ** 2 + 1e-4
    for kind in options.kinds or KINDS:
        for mode, weights in (("", None), (" weighted", importance)):
            if options.only != "gpu":
                on_cpu(kind, mode, x, weights)
            if options.only == "gpu" or (options.only is None and DEVICE.type == "cuda"):
                on_gpu(kind, mode, x, weights)


if __name__ == "__main__":
    main()
