"""Where a training step's host time goes: launching, not computing. Small batches are bound by it.

    python benchmarks/profile_host.py FOLDER [--batch 2] [--seq 2048]

Prints the milliseconds that forward and backward take to queue, then each function's own time, for both.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time

import torch
from step import Wanted


def main() -> None:
    """Loads, warms up, times the queueing, profiles one forward and one backward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a checkpoint, such as step.py makes")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=45)
    a = parser.parse_args()
    model = Wanted("hotloop", a.folder, checkpointing=False, longest=a.seq).load()
    ids = torch.randint(3, 1000, (a.batch, a.seq), device="cuda")

    def forward() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        loss = forward()
        t1 = time.perf_counter()
        loss.backward()
        t2 = time.perf_counter()
        torch.cuda.synchronize()
        t3 = time.perf_counter()
        model.zero_grad(set_to_none=True)
        times.append([1e3 * (t1 - t0), 1e3 * (t2 - t1), 1e3 * (t3 - t2)])
    f, b, w = (sorted(column)[4] for column in zip(*times, strict=True))
    print(
        json.dumps({"forward_ms": round(f, 2), "backward_ms": round(b, 2), "wait_ms": round(w, 2)})
    )
    for what in ("forward", "backward"):
        loss = forward() if what == "backward" else None
        torch.cuda.synchronize()
        profile = cProfile.Profile()
        with torch.autograd.set_multithreading_enabled(False):
            profile.enable()
            if loss is None:
                forward()
            else:
                loss.backward()
            profile.disable()
        print(what)
        pstats.Stats(profile).sort_stats("tottime").print_stats(a.rows)


if __name__ == "__main__":
    main()
