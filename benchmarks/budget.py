"""Training steps within memory budgets, measured beside what was planned: one row of the history for each setting.

    python benchmarks/budget.py llama3-70b 2x2048@23 2x2048@78 1x2048@least --run h100-8 --commit SHA --out rows.jsonl
    python benchmarks/budget.py mistral-7b 1x57344@23 1x131072@23 --steps 2 --folder DIR ...
    python benchmarks/budget.py llama3-8b 1x700000@78 --layers 4 --steps 2 ...

A setting is BATCHxSEQUENCE@GIB, or @least for the least that the planner finds. The process may take that much of the
card and no more, as on a smaller one. The model is of a shape in shapes.json, NF4 with random weights, LoRA of rank 16
on every projection, 8-bit AdamW, bf16 autocast. `first_s` is the first step, which compiles kernels and locks memory of
the host; `step_s` the median of the steps after the second, which compiles the optimizer's kernel, or the last. While
one process measures, the next imports and waits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contest import about
from nf4_checkpoint import write
from step import GIB, SHAPES, Training, cap, fresh_peak, peaks


def read(setting: str) -> tuple[int, int, float | None]:
    """(sequences, tokens of each, GiB; None for the least)."""
    size, _, budget = setting.partition("@")
    batch, _, length = size.partition("x")
    try:
        return int(batch), int(length), None if budget == "least" else float(budget)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {setting!r}, expected BATCHxSEQUENCE@GIB, such as 2x2048@23 or 2x2048@least"
        ) from None


def least(folder: str, tokens: int, length: int) -> float:
    """GiB, rounded up to a hundredth."""
    from hotloop.planner import Request
    from hotloop.planner.task import Task

    found = Task.of(folder, Request(tokens=tokens, longest=length, lora=16)).least()
    assert found is not None, "the host cannot hold it"
    return -(-found[0] * 100 // GIB) / 100


def child(folder: str, setting: str, steps: int) -> None:
    """Waits for a line, then measures; prints one JSON line."""
    from hotloop import FastLanguageModel
    from hotloop.loading.load import EXPECTED_RANK
    from hotloop.planner.host import host_limit
    from hotloop.wiring import receipt_of

    sys.stdin.readline()
    batch, length, vram = read(setting)
    vram = least(folder, batch * length, length) if vram is None else vram
    cap(vram)
    host = round(host_limit(again=False) / GIB, 2)
    began = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=length, vram=f"{vram}GiB", local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=1).train()
    row: dict[str, Any] = {"vram": vram, "load_s": round(time.perf_counter() - began, 1)}
    row |= {"expected_rank": EXPECTED_RANK, "host_limit_gib": host}
    row["after_load_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
    training = Training(model)
    fresh_peak()
    draw = torch.Generator("cuda").manual_seed(7)
    ids = torch.randint(3, 30000, (batch, length), device="cuda", generator=draw)
    seconds, losses, norms = zip(*(training.step(ids) for _ in range(steps)), strict=True)
    receipt = receipt_of(model)
    assert receipt is not None and receipt.plan is not None
    plan = receipt.plan
    step = median(seconds[2:] or seconds[-1:])
    row |= {
        "tok_s": round(batch * length / step),
        "step_s": round(step, 4),
        "first_s": round(seconds[0], 2),
        "planned_s": round(sum(plan.step_ms.values()) / 1e3, 4),
        "loss": [round(x, 4) for x in losses],
        "grad_norm": [round(x, 4) for x in norms],
        **peaks(),
        "planned_gib": round(plan.peak_bytes / GIB, 2),
        "host_gib": round(plan.host_bytes / GIB, 2),
        "dequantised": len(plan.dequantised),
    }
    print(json.dumps(row), flush=True)
    print(plan, file=sys.stderr)


def start(folder: Path, setting: str, steps: int) -> subprocess.Popen[str]:
    """A process that imports, and then waits."""
    command = [sys.executable, __file__, "--child", str(folder), setting, str(steps)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )


def main() -> None:
    """Measures each setting in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("settings", nargs="+", help="BATCHxSEQUENCE@GIB or @least")
    parser.add_argument("--layers", type=int, help="of the shape, instead of all")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--each", type=float, default=300, help="seconds for one setting")
    parser.add_argument("--folder", help="where the checkpoint is made, and stays")
    parser.add_argument("--run", required=True, help="a name for this run, in each row")
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--out", required=True, help="the file to which rows are appended")
    options = parser.parse_args()
    name, shape = options.shape, dict(SHAPES[options.shape])
    if options.layers:
        shape["num_hidden_layers"] = options.layers
        name += f"-{options.layers}layers"
    for setting in options.settings:
        read(setting)
    failed = 0
    with ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "config.json").exists():
            write(shape, folder)
        waiting = [start(folder, options.settings[0], options.steps)]
        for number, setting in enumerate(options.settings):
            process = waiting.pop()
            for following in options.settings[number + 1 :][:1]:
                waiting.append(start(folder, following, options.steps))
                stack.callback(waiting[-1].kill)
            try:
                out, _ = process.communicate("go\n", timeout=options.each)
            except subprocess.TimeoutExpired:
                process.kill()
                out, _ = process.communicate()
            found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            if not found:
                failed += 1
                print(f"{setting}: no row", file=sys.stderr)
            for line in found:
                batch, length, _ = read(setting)
                what = {"model": name, "framework": "hotloop", "bits": 4, "ckpt": True}
                what |= {"batch": batch, "seq": length, "placements": None}
                row = about(options.run, options.commit) | what | line
                with Path(options.out).open("a", encoding="utf-8") as rows:
                    rows.write(json.dumps(row) + "\n")
                print(json.dumps(what | line), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
