"""Every op's benchmark, its rows appended to benchmarks/history.

    python benchmarks/run_ops.py                    all, about three minutes on an H100
    python benchmarks/run_ops.py nf4 attention      some
    python benchmarks/run_ops.py --smoke            any machine: do they run to their end? Nothing is appended

Rows are appended as they come, so a script that fails or outlives its time keeps what it has measured.
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
    "elementwise": (["op_elementwise.py"], 120),
    "nf4": (["op_nf4.py"], 60),
    "linear_cross_entropy": (["op_linear_cross_entropy.py"], 90),
    "attention": (["op_attention.py"], 180),
    "attention_gemma2": (["op_attention.py", "--gemma2"], 120),
}
"""Name -> the script with its arguments, and the seconds after which it is stopped. Rows go to op_NAME.jsonl."""


def run(name: str, history: Path | None, *, smoke: bool) -> str | None:
    """Runs one script; returns what went wrong, or None."""
    words, seconds = SCRIPTS[name]
    script, *options = words
    command = [sys.executable, str(HERE / script), *options, *(["--smoke"] if smoke else [])]
    environment = dict(os.environ)
    if smoke:
        environment.setdefault("TRITON_INTERPRET", "1")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
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
                with (history / f"op_{name.removesuffix('_gemma2')}.jsonl").open("a") as file:
                    file.write(line)
    finally:
        timer.cancel()
    code = process.wait()
    print(f"# {name}: {rows} rows in {perf_counter() - begin:.0f} s", flush=True)
    if code < 0:
        return f"{name}: stopped by signal {-code} (its limit is {seconds} s)"
    if code:
        return f"{name}: exit {code}"
    return None if rows else f"{name}: no rows"


def main() -> None:
    """Runs what is asked for; exits with what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*SCRIPTS, []], help="default: all")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--history", type=Path, default=HERE / "history")
    options = parser.parse_args()
    history = None if options.smoke else options.history
    if history is not None:
        history.mkdir(parents=True, exist_ok=True)
    wrong = [run(name, history, smoke=options.smoke) for name in options.names or SCRIPTS]
    sys.exit("\n".join(filter(None, wrong)) or None)


if __name__ == "__main__":
    main()
