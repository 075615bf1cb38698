"""Every op's benchmark, its rows appended to benchmarks/history.

    python benchmarks/run_ops.py                    all but the tuning, within eight minutes on an H100
    python benchmarks/run_ops.py nf4 attention      some
    python benchmarks/run_ops.py --seconds 300      all in five minutes: each script gets its share of them
    python benchmarks/run_ops.py tune_attention tune_linear_cross_entropy
    python benchmarks/run_ops.py --smoke            any machine: do they run to their end? Nothing is appended

Rows are appended as they come. A script begins nothing new when its time is over and says what it left out; one that
does not end within `GRACE_SECONDS` more, which compiling what it has begun may take, is stopped and keeps its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).parent
SCRIPTS: dict[str, tuple[list[str], int]] = {
    "elementwise": (["op_elementwise.py"], 100),
    "nf4": (["op_nf4.py"], 45),
    "linear_cross_entropy": (["op_linear_cross_entropy.py"], 90),
    "attention": (["op_attention.py"], 150),
    "attention_gemma2": (["op_attention.py", "--gemma2"], 95),
}
"""Name -> the script with its arguments, and its seconds. Rows go to op_NAME.jsonl."""

TUNING: dict[str, tuple[list[str], int]] = {
    "tune_attention": (["tune_attention.py"], 120),
    "tune_adapters": (["tune_adapters.py"], 60),
    "tune_linear_cross_entropy": (["op_linear_cross_entropy.py", "--tune"], 60),
}
"""The same, run only if named. Rows go to NAME.jsonl: no page shows them."""

GRACE_SECONDS = 90


def run(name: str, seconds: float, history: Path | None, *, smoke: bool) -> str | None:
    """Runs one script; returns what went wrong, or None."""
    script, *options = (SCRIPTS | TUNING)[name][0]
    command = [sys.executable, str(HERE / script), *options, "--seconds", f"{seconds:.0f}"]
    command += ["--smoke"] if smoke else []
    environment = dict(os.environ)
    if smoke:
        environment.setdefault("TRITON_INTERPRET", "1")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    timer = threading.Timer(seconds + GRACE_SECONDS, process.kill)
    timer.start()
    begin, rows = perf_counter(), 0
    try:
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
                continue
            row = json.loads(line)
            rows += 1
            print(
                f"{row['op']} {row['mode']} {row['variant']} {row['p50_ms']} ms "
                f"{row.get('share_of_copy', row.get('tflop_s', ''))}",
                flush=True,
            )
            if history is not None:
                with (history / file_of(name)).open("a") as file:
                    file.write(line)
    finally:
        timer.cancel()
    code = process.wait()
    print(f"# {name}: {rows} rows in {perf_counter() - begin:.0f} s", flush=True)
    if code < 0:
        return (
            f"{name}: stopped by signal {-code} ({seconds:.0f} + {GRACE_SECONDS} s are its limit)"
        )
    if code:
        return f"{name}: exit {code}"
    return None if rows else f"{name}: no rows"


def file_of(name: str) -> str:
    """The file in the history that a script's rows go to."""
    return f"{name}.jsonl" if name in TUNING else f"op_{name.removesuffix('_gemma2')}.jsonl"


def main() -> None:
    """Runs what is asked for; exits with what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*SCRIPTS, *TUNING, []])
    parser.add_argument(
        "--seconds", type=float, help="for all together; what compiles may exceed it"
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--history", type=Path, default=HERE / "history")
    options = parser.parse_args()
    history = None if options.smoke else options.history
    if history is not None:
        history.mkdir(parents=True, exist_ok=True)
    shares = {name: (SCRIPTS | TUNING)[name][1] for name in options.names or SCRIPTS}
    scale = (
        10.0 if options.smoke else 1.0
    )  # the interpreter is slow, and nothing should be left out
    if options.seconds is not None:
        scale = options.seconds / sum(shares.values())
    wrong = [
        run(name, scale * share, history, smoke=options.smoke) for name, share in shares.items()
    ]
    sys.exit("\n".join(filter(None, wrong)) or None)


if __name__ == "__main__":
    main()
