"""Training steps of Hotloop and its peers on several models' shapes, one process after another, as rows of the history.

    python benchmarks/contest.py YARDSTICK --run h100-7 --models mistral-7b,gemma-2-9b --out rows.jsonl
    python benchmarks/contest.py YARDSTICK --run h100-7 --models llama3-8b --bits 16 --frameworks hotloop,unsloth

YARDSTICK is the script that measures one framework on one checkpoint (`step.py make | run`); it treats all alike. This
one makes each checkpoint (random weights, real shape), runs the frameworks on it in turn, first without recomputation
and then with, adds to each of their lines what makes it comparable, and removes the checkpoint. A framework that fails
leaves a row with the end of its error. What does not start before `--seconds` are over is left out and named at the
end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from runpy import run_path
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

GEMMA = {"head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-7b": (
        "gemma",
        {**GEMMA, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "num_key_value_heads": 16},
    ),
    "gemma-2-9b": (
        "gemma2",
        {**GEMMA, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "query_pre_attn_scalar": 256},
    ),
    "qwen2.5-7b": (
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
        | {"max_position_embeddings": 32768, "rope_theta": 1e6},
    ),
    "qwen3-8b": (
        "qwen3",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
        | {"vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1e6},
    ),
}
"""Shapes beside the yardstick's own, as their config.json has them."""

MAKE = """
import runpy, sys, json
step = runpy.run_path(sys.argv[1], run_name="step")
step["MODELS"].update(json.loads(sys.argv[4]))
step["make"](sys.argv[2], sys.argv[3])
"""

VERSIONS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth")


@dataclass(frozen=True)
class Start:
    """One process of the yardstick."""

    model: str
    framework: str
    checkpointing: bool


def starts(options: argparse.Namespace) -> Iterator[Start]:
    """Model by model; Hotloop and what it is compared with close together in time."""
    for model in options.models.split(","):
        for mode in options.modes.split(","):
            for framework in options.frameworks.split(","):
                yield Start(model, framework, mode == "recompute")


def measured(start: Start, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines of one process, or one that says how it failed."""
    command = [sys.executable, options.yardstick, "run", start.framework, str(folder)]
    command += ["--settings", options.settings, "--bits", str(options.bits)]
    command += ["--steps", str(options.steps)]
    command += [] if start.checkpointing else ["--no-ckpt"]
    command += [] if options.vram is None else ["--vram", str(options.vram)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.each, check=False
        )
        out, failed = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        failed = f"not done in {options.each} s"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    setup = next((line for line in lines if "load_s" in line), {})
    for line in lines:
        if "batch" in line:
            yield line | {k: setup[k] for k in ("load_s", "after_load_gib") if k in setup}
    if failed:
        yield {"framework": start.framework, "bits": options.bits, "error": failed[-400:]}


def versions() -> dict[str, str]:
    """Of what is installed."""
    found: dict[str, str] = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def card() -> str:
    """The name of the device."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def contest(options: argparse.Namespace) -> int:
    """Runs everything; returns how many processes were left out or failed."""
    ends = monotonic() + options.seconds
    known = {**run_path(options.yardstick, run_name="step")["MODELS"], **SHAPES}
    unknown = set(options.models.split(",")) - known.keys()
    if unknown:
        sys.exit(f"no shape is called {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    about = {
        "run": options.run,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": options.commit,
        "card": card(),
        "versions": versions(),
    }
    missing, made = [], None
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for start in starts(options):
            if monotonic() > ends:
                missing.append(start)
                continue
            folder = Path(scratch) / start.model
            if made != start.model:
                if made is not None:
                    shutil.rmtree(Path(scratch) / made)
                subprocess.run(
                    [sys.executable, "-c", MAKE, options.yardstick, start.model, str(folder), json.dumps(SHAPES)],
                    check=True,
                )  # fmt: skip
                made = start.model
            for line in measured(start, folder, options):
                row = {**about, "model": start.model, **line}
                with Path(options.out).open("a", encoding="utf-8") as rows:
                    rows.write(json.dumps(row) + "\n")
                print(json.dumps(line), flush=True)
                missing += [start] * ("error" in line)
    for start in missing:
        print(f"left out or failed: {start}", file=sys.stderr)
    return len(missing)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("yardstick", help="the script that measures one framework")
    parser.add_argument("--run", required=True, help="a name for this run, in each row")
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--models", default="llama3-8b")
    parser.add_argument("--frameworks", default="hotloop,unsloth,liger,hf")
    parser.add_argument("--modes", default="keep,recompute")
    parser.add_argument("--settings", default="2x2048,8x2048")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--vram", type=float, help="GiB that each process may take")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--each", type=float, default=180, help="seconds for one process")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing starts")
    parser.add_argument("--folder", help="where checkpoints are made")
    parser.add_argument("--out", required=True, help="the file to which rows are appended")
    sys.exit(min(1, contest(parser.parse_args())))


if __name__ == "__main__":
    main()
