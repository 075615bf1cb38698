"""Where a training step's time goes: kernels by name and by kind, beside the step's wall time.

    python benchmarks/profile_step.py FOLDER [--batch 8] [--seq 2048] [--bits 4] [--no-ckpt] [--rows 40]
    python benchmarks/profile_step.py FOLDER --framework unsloth

Prints one JSON line for the step and one for each kind of kernel, then a table of the kernels, and between which of
them the device waited.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from itertools import pairwise

import torch
from step import Wanted
from torch.profiler import ProfilerActivity, profile

KINDS = {  # the first match counts
    "attention": ("flash", "fmha", "cudnn_generated_fort", "sdpa", "attention", "FlashAttn"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "splitK", "cublas"),
    "nf4": ("nf4", "dequant", "4bit"),
    "norm": ("norm",),
    "rope": ("rope", "rotate"),
    "glu": ("glu", "silu", "gelu"),
    "loss": ("cross_entropy", "softmax", "logits", "rows"),
    "optimizer": ("adam", "Optimizer", "multi_tensor"),
    "copy": ("copy", "Memcpy", "Memset", "fill", "CatArray"),
}


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    lowered = name.lower()
    for kind, words in KINDS.items():
        if any(word.lower() in lowered for word in words):
            return kind
    return "other"


def waits(run: profile) -> list[tuple[float, int, str]]:
    """(milliseconds a step, times a step, "kernel -> next kernel") of the device's idle time, longest first."""
    device = [e for e in run.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    device.sort(key=lambda e: e.time_range.start)
    found: dict[str, list[float]] = defaultdict(list)
    end = device[0].time_range.start
    for before, after in pairwise(device):
        end = max(end, before.time_range.end)
        gap = after.time_range.start - end
        if gap > 0:
            found[f"{before.name[:44]} -> {after.name[:44]}"].append(gap / 1e3)
    return sorted(((sum(g) / 2, len(g) // 2, name) for name, g in found.items()), reverse=True)


def main() -> None:
    """Loads, warms up, profiles two steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a checkpoint, such as step.py makes")
    parser.add_argument("--framework", default="hotloop")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--no-ckpt", dest="ckpt", action="store_false")
    parser.add_argument("--rows", type=int, default=40)
    a = parser.parse_args()
    wanted = Wanted(a.framework, a.folder, bits=a.bits, checkpointing=a.ckpt, longest=a.seq)
    model = wanted.load()
    ids = torch.randint(3, 1000, (a.batch, a.seq), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
    start.record()
    for _ in range(3):
        step()
    stop.record()
    torch.cuda.synchronize()
    wall_ms = start.elapsed_time(stop) / 3
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
    kernels = [e for e in run.key_averages() if e.self_device_time_total > 0]
    kinds: dict[str, float] = defaultdict(float)
    for e in kernels:
        if e.device_type == torch.autograd.DeviceType.CUDA:
            kinds[kind_of(e.key)] += e.self_device_time_total / 2000
    print(json.dumps({"step_ms": round(wall_ms, 2), "kernel_ms": round(sum(kinds.values()), 2)}))
    print(
        json.dumps({kind: round(ms, 2) for kind, ms in sorted(kinds.items(), key=lambda i: -i[1])})
    )
    rows = [e for e in kernels if e.device_type == torch.autograd.DeviceType.CUDA]
    for e in sorted(rows, key=lambda e: -e.self_device_time_total)[: a.rows]:
        print(f"{e.self_device_time_total / 2000:9.3f} ms {e.count // 2:5d}x {e.key[:120]}")
    gaps = waits(run)
    print(f"the device waits {sum(ms for ms, _, _ in gaps):.2f} ms a step")
    for ms, count, name in gaps[: a.rows]:
        print(f"{ms:9.3f} ms {count:5d}x {name}")


if __name__ == "__main__":
    main()
