"""Training steps of Hotloop and its peers on several models' shapes, one process after another, as rows of the history.

    python benchmarks/contest.py --run h100-7 --commit SHA --models mistral-7b,gemma-2-9b --out rows.jsonl
    python benchmarks/contest.py --run h100-7 --commit SHA --bits 16 --starts hotloop:keep,unsloth:keep --out rows.jsonl
    python benchmarks/contest.py --run h100-7 --commit SHA --starts hotloop:recompute:3.4 --out rows.jsonl

`step.py`, or another script with its two commands that `--yardstick` names, measures one framework on one checkpoint
and treats all alike. This one makes each checkpoint (random weights, real shape), runs on it what `--starts` names, one
after another, adds to each of their lines what makes it comparable, and removes the checkpoint. A framework that fails
leaves a row with the end of its error. What does not start before `--seconds` are over is left out and named at the
end.

A card costs by the minute: while one process measures, the next imports its packages and waits, and while the last
of a model's processes runs, the next checkpoint is made, for which the card works some seconds. Let the last one be
something that may be disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from runpy import run_path
from time import monotonic
from typing import TYPE_CHECKING, Any

import step

if TYPE_CHECKING:
    from collections.abc import Iterator

MAKE = """
import runpy, sys, json
step = runpy.run_path(sys.argv[1], run_name="step")
step["MODELS"].update(json.loads(sys.argv[4]))
step["make"](sys.argv[2], sys.argv[3])
"""

WAIT = """
import importlib, runpy, sys
for name in sys.argv.pop(1).split(","):
    importlib.import_module(name)
sys.stdin.readline()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs the yardstick once a line arrives, with what it will import already there."""

IMPORTS = {
    "unsloth": "unsloth",  # before transformers, as it asks
    "liger": "liger_kernel.transformers,peft,bitsandbytes",
}

VERSIONS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth")


@dataclass(frozen=True)
class Start:
    """One process of the yardstick."""

    framework: str
    checkpointing: bool
    vram: str | None

    @classmethod
    def read(cls, text: str) -> Start:
        """FRAMEWORK:keep or FRAMEWORK:recompute, with :GIB the process is capped."""
        framework, _, rest = text.partition(":")
        mode, _, vram = rest.partition(":")
        if mode not in ("keep", "recompute"):
            raise argparse.ArgumentTypeError(
                f"found {text!r}, expected FRAMEWORK:keep or FRAMEWORK:recompute, "
                "with a third part for GiB that the process may take."
            )
        return cls(framework, mode == "recompute", vram or None)


def begin(start: Start, folder: Path, options: argparse.Namespace) -> subprocess.Popen[str]:
    """The process, importing; it measures when a line is written to it."""
    imports = IMPORTS.get(start.framework, "peft,bitsandbytes")
    command = [sys.executable, "-c", WAIT, imports, options.yardstick, "run", start.framework]
    command += [str(folder), "--settings", options.settings, "--bits", str(options.bits)]
    command += ["--steps", str(options.steps)]
    command += [] if start.checkpointing else ["--no-ckpt"]
    command += [] if start.vram is None else ["--vram", start.vram]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, **step.OFFLINE}
    if options.fa4 and start.framework.startswith("hotloop"):
        paths = [options.fa4, environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def measured(
    start: Start, process: subprocess.Popen[str], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The lines of one process, or one that says how it failed."""
    try:
        out, errors = process.communicate("go\n", timeout=options.each)
        failed = errors if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        failed = f"not done in {options.each} s"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    setup = next((line for line in lines if "load_s" in line), {})
    for line in lines:
        if "batch" in line:
            yield line | {k: setup[k] for k in ("load_s", "after_load_gib") if k in setup}
    if failed:
        yield {"framework": start.framework, "bits": options.bits, "error": failed[-400:]}


def make(model: str, folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A process that writes the model's checkpoint."""
    command = [sys.executable, "-c", MAKE, options.yardstick, model, str(folder)]
    return subprocess.Popen([*command, json.dumps(step.MODELS)])


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


def about(run: str, commit: str) -> dict[str, Any]:
    """What every row says of its run."""
    return {
        "run": run,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "card": card(),
        "versions": versions(),
    }


def contest(options: argparse.Namespace) -> int:
    """Runs everything; returns how many processes were left out or failed."""
    ends = monotonic() + options.seconds
    known = {**run_path(options.yardstick, run_name="step")["MODELS"], **step.MODELS}
    unknown = set(options.models.split(",")) - known.keys()
    if unknown:
        sys.exit(f"no shape is called {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    common = about(options.run, options.commit)
    missing: list[str] = []
    models = options.models.split(",")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch, ExitStack() as running:
        there = {} if options.folder is None else {m: Path(options.folder) / m for m in models}
        folders = {m: f for m, f in there.items() if f.exists()}
        to_make = [m for m in models if m not in folders]
        folders |= {m: Path(scratch) / m for m in to_make}
        turns = [(model, start) for model in models for start in options.starts]
        makers: dict[str, subprocess.Popen[bytes]] = {}

        def make_ahead(model: str) -> None:
            if model in to_make:
                makers[model] = running.enter_context(make(model, folders[model], options))

        make_ahead(models[0])
        ready: dict[int, subprocess.Popen[str]] = {}
        for number, (model, start) in enumerate(turns):
            for n in range(number, min(number + 2, len(turns))):
                if n not in ready and monotonic() < ends:
                    process = begin(turns[n][1], folders[turns[n][0]], options)
                    running.callback(process.kill)
                    ready[n] = process
            if model in makers and makers[model].wait():
                raise subprocess.CalledProcessError(makers[model].returncode, "make")
            if (number + 1) % len(options.starts) == 0:
                for following in models[models.index(model) + 1 :][:1]:
                    make_ahead(following)
            if number not in ready or monotonic() > ends:
                missing.append(f"{model}, {start}: no time left")
                continue
            for line in measured(start, ready.pop(number), options):
                row = {**common, "model": model, **line}
                if options.fa4 and start.framework.startswith("hotloop"):
                    row["attention"] = "flash-attn-4"
                with Path(options.out).open("a", encoding="utf-8") as rows:
                    rows.write(json.dumps(row) + "\n")
                print(json.dumps(line), flush=True)
                missing += [f"{model}, {start}: failed"] * ("error" in line)
            if (number + 1) % len(options.starts) == 0 and model in to_make:
                shutil.rmtree(folders[model])
    for line in missing:
        print(line, file=sys.stderr)
    return len(missing)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--yardstick", default=step.__file__, help="what measures one framework")
    parser.add_argument("--run", required=True, help="a name for this run, in each row")
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--models", default="llama3-8b")
    parser.add_argument(
        "--starts", type=lambda text: [Start.read(part) for part in text.split(",")],
        default="hotloop:keep,unsloth:keep,hotloop:recompute,unsloth:recompute,liger:recompute,hf:recompute",
    )  # fmt: skip
    parser.add_argument("--settings", default="2x2048,8x2048")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--fa4", help="where flash-attn-4 is, for Hotloop's processes alone")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--each", type=float, default=180, help="seconds for one process")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing starts")
    parser.add_argument(
        "--folder", help="where checkpoints are made; one that is there is used, and stays"
    )
    parser.add_argument("--out", required=True, help="the file to which rows are appended")
    sys.exit(min(1, contest(parser.parse_args())))


if __name__ == "__main__":
    main()
