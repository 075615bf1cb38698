"""SmolLM2-135M learns real text: transformers + PEFT beside Hotloop, loss and held-out loss, two seeds each.

    python benchmarks/smollm2_curve.py                       finds the model as the quickstart does
    python benchmarks/smollm2_curve.py --model FOLDER_OR_GGUF --history rows.jsonl
    python benchmarks/smollm2_curve.py --draw docs/smollm2-curve.svg

The text is CPython's language reference (`pydoc_data.topics`: 460 KB of English that comes with every Python, under the
PSF licence). Every tenth topic is held out. The same seed gives both the same adapters to start from and the same
batches in the same order; the two seeds differ in both, which is the noise that a difference must be seen against.
LoRA r=16 on all projections of a 16-bit base, AdamW, under bf16 autocast on a GPU, as Trainer does it. One JSON line a
run, appended to benchmarks/history/curves.jsonl. --draw makes a picture of the last runs there and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import hotloop
import torch
from hotloop.training.quickstart import find_model
from measure import DEVICE, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

HISTORY = Path(__file__).parent / "history" / "curves.jsonl"
FRAMEWORKS = {"hf": "transformers + PEFT", "hotloop": "Hotloop"}
HELD_OUT = 32  # blocks at most: more than all of them at 512 tokens
VERSIONS = ("torch", "transformers", "peft", "triton")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the runs share. held_out_every: a held-out loss after so many steps, and before the first."""

    model: str
    steps: int = 200
    batch: int = 4
    length: int = 512
    rank: int = 16
    learning_rate: float = 5e-4
    warmup: int = 10
    held_out_every: int = 50


def topics() -> list[str]:
    """The sections of CPython's language reference, in the order of their names."""
    from pydoc_data.topics import topics as found

    return [found[name] for name in sorted(found)]


def blocks(texts: list[str], tokenizer: Any, length: int) -> Tensor:
    """[count, length]: the texts one behind the other, an end of text after each; what fills no block is left."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def batches(data: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches without end: every block once an epoch, in an order that the seed gives."""
    order = random.Random(seed)
    while True:
        rows = list(range(len(data)))
        order.shuffle(rows)
        for start in range(0, len(rows) - batch + 1, batch):
            yield data[rows[start : start + batch]].to(DEVICE)


def precision() -> Any:
    """Autocast as Trainer's bf16=True has it; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if DEVICE.type == "cuda" else nullcontext()


def mean_loss(model: Any, data: Tensor, batch: int) -> float:
    """The loss of all blocks, without gradients."""
    model.eval()
    with torch.no_grad(), precision():
        losses = [
            float(model(input_ids=part.to(DEVICE), labels=part.to(DEVICE)).loss) * len(part)
            for part in data.split(batch)
        ]
    model.train()
    return sum(losses) / len(data)


def train(framework: str, seed: int, setting: Setting) -> dict[str, Any]:
    """One run; returns its row."""
    model, tokenizer = hotloop.load(
        setting.model,
        bits=16,
        max_seq_len=setting.batch * setting.length,
        wire=framework == "hotloop",
    )
    texts = topics()
    learned = blocks([t for i, t in enumerate(texts) if i % 10], tokenizer, setting.length)
    held_out = blocks(texts[::10], tokenizer, setting.length)[:HELD_OUT]
    torch.manual_seed(seed)
    model = hotloop.add_lora(model, r=setting.rank, alpha=2 * setting.rank, seed=seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / setting.warmup)
    )
    model.train()
    losses: list[Tensor] = []
    held_out_losses = [(0, mean_loss(model, held_out, setting.batch))]
    source = batches(learned, setting.batch, seed)
    begin = perf_counter()
    for step in range(1, setting.steps + 1):
        ids = next(source)
        with precision():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % setting.held_out_every == 0 or step == setting.steps:
            held_out_losses.append((step, mean_loss(model, held_out, setting.batch)))
    curve = [round(float(x), 5) for x in losses]
    return {
        "framework": framework,
        "seed": seed,
        "model": Path(setting.model).stem,
        "text": f"pydoc_data.topics, {len(texts)} topics, every tenth held out",
        "blocks": [len(learned), len(held_out)],
        "steps": setting.steps,
        "tokens_per_step": setting.batch * setting.length,
        "learning_rate": setting.learning_rate,
        "rank": setting.rank,
        "loss": curve,
        "held_out": [(step, round(value, 5)) for step, value in held_out_losses],
        "seconds": round(perf_counter() - begin, 1),
    }


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def last_runs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of each framework and seed, of the newest run."""
    newest = [row for row in rows if row["run"] == rows[-1]["run"]] if rows else []
    return list({(row["framework"], row["seed"]): row for row in newest}.values())


def differences(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The mean distance of two loss curves, each averaged over windows of steps, and of the last held-out losses.

    frameworks: between the two at the same seed. seeds: between two seeds of one of them.
    """
    by_key = {(row["framework"], row["seed"]): row for row in rows}
    names, seeds = (sorted({key[i] for key in by_key}) for i in (0, 1))
    pairs = {
        "frameworks": [[(n, seed) for n in names] for seed in seeds],
        "seeds": [[(name, s) for s in seeds] for name in names],
    }
    found: dict[str, float] = {}
    for kind, groups in pairs.items():
        rows_of = [[by_key[key] for key in group] for group in groups]
        found[f"loss, {kind}"] = statistics.mean(
            statistics.mean(
                abs(x - y) for x, y in zip(*(smooth(r["loss"])[1] for r in pair), strict=True)
            )
            for pair in rows_of
        )
        found[f"held-out loss, {kind}"] = statistics.mean(
            abs(pair[0]["held_out"][-1][1] - pair[1]["held_out"][-1][1]) for pair in rows_of
        )
    return found


def smooth(values: list[float]) -> tuple[list[int], list[float]]:
    """The last step and the mean of each of about twenty windows of steps."""
    window = max(1, len(values) // 20)
    ends = range(window, len(values) + 1, window)
    return list(ends), [statistics.mean(values[end - window : end]) for end in ends]


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Loss on the left, held-out loss on the right; the same colour for a framework, a dash for the second seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hotloop"  # the same picture, the same bytes
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = dict(zip(FRAMEWORKS, ("tab:gray", "tab:orange"), strict=True))
    seeds = sorted({row["seed"] for row in rows})
    for row in rows:
        style = {
            "color": colours[row["framework"]],
            "linestyle": ("-", "--", ":")[seeds.index(row["seed"]) % 3],
            "label": f"{FRAMEWORKS[row['framework']]}, seed {row['seed']}",
        }
        left.plot(*smooth(row["loss"]), **style)
        right.plot(*zip(*row["held_out"], strict=True), marker="o", **style)
    left.set_title("training loss, means of windows of steps")
    right.set_title("held-out loss")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    """Trains and appends, or draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder, a GGUF file or a hub id")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--history", type=Path, default=HISTORY)
    parser.add_argument("--draw", type=Path, metavar="PICTURE")
    options = parser.parse_args()
    if options.draw is None:
        setting = Setting(
            model=options.model or find_model(),
            steps=options.steps,
            batch=options.batch,
            length=options.length,
        )
        run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        options.history.parent.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for framework in FRAMEWORKS:
                row = train(framework, seed, setting)
                card = environment()["gpu"] if DEVICE.type == "cuda" else "CPU"
                row = {
                    "run": run, "date": run[:10], "commit": environment()["commit"], "card": card,
                    **row, "versions": versions(),
                }  # fmt: skip
                with options.history.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(framework, seed, row["held_out"], f"{row['seconds']} s", flush=True)
    lines = options.history.read_text(encoding="utf-8").splitlines()
    rows = last_runs([json.loads(line) for line in lines])
    for name, value in differences(rows).items():
        print(f"{name}: {value:.5f}")
    if options.draw is not None:
        draw(rows, options.draw)


if __name__ == "__main__":
    main()
