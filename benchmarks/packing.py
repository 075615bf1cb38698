"""Useful tokens per second on rows of mixed length: packed, padded, and what packing itself costs.

    python benchmarks/packing.py MODEL [--out benchmarks/history/packing.jsonl] [--seconds 12] [--who hotloop]
    python benchmarks/packing.py --tiny              does it run? On a CPU, with a tiny model; its times mean nothing.

The mix is the worked example's: 60% of the rows under 256 tokens, 40% up to 1,024, bins of 2,048. Every contestant
trains the same rows in the same order with the same LoRA (r=16 on seven projections, NF4 base), 8-bit AdamW and bf16
autocast, in a process of its own, and prints one JSON line:

- hotloop: the rows of a step packed, 4 bins laid end to end.
- hotloop-padded, hf: 4 micro-batches of 8 rows to a step, padded to the longest; hf is transformers + PEFT under SDPA,
  without checkpointing where that fits. In random order, as Trainer has it.
- unsloth: the bins of `hotloop`, told apart by position_ids; whether it kept rows apart is measured and reported.

A useful token is one of a row, not padding. `hotloop` also times a packed batch against a dense one of the same tokens
and attention flops (rows of 511 and 513 tokens against 512): `overhead`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata as metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

WHO = ("hotloop", "hotloop-padded", "hf", "unsloth")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "flash-attn-4")
INPUTS = ("input_ids", "labels", "position_ids", "attention_mask")
ROWS = 10_000
WARMUP = 3  # steps that compile kernels and fill the allocator
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Tokens of bins and rows; bins of a step; rows of a micro-batch, micro-batches of a step."""

    capacity: int = 2048
    long: int = 1024
    short: int = 256
    bins: int = 4
    rows: int = 8
    micro: int = 4
    vocabulary: int = 100_000
    dense: tuple[int, int] = (16, 512)


TINY = Sizes(capacity=64, long=32, short=8, bins=2, rows=4, micro=2, vocabulary=250, dense=(4, 16))

Batch = dict[str, Any]
Model = Any


def lengths(sizes: Sizes, seed: int = 0) -> list[int]:
    """The worked example: 60% of the rows under 256 tokens, 40% up to 1,024, shuffled."""
    import numpy as np

    random = np.random.default_rng(seed)
    short = ROWS * 6 // 10
    drawn = np.concatenate(
        [random.integers(1, sizes.short, short), random.integers(1, sizes.long + 1, ROWS - short)]
    )
    return random.permutation(drawn).tolist()


def ids_of(row: int, length: int, sizes: Sizes) -> list[int]:
    """Random token ids, the same for every contestant."""
    import numpy as np

    return np.random.default_rng([1, row]).integers(3, sizes.vocabulary, length).tolist()


def packed_steps(sizes: Sizes) -> Iterator[list[Batch]]:
    """One batch a step: some bins laid end to end."""
    from hotloop_core.packing import PackedBatch, pack

    packing = pack(lengths(sizes), sizes.capacity)
    order = packing.order(each=sizes.bins).tolist()
    for start in range(0, len(order) - sizes.bins + 1, sizes.bins):
        pieces = [piece for bin in order[start : start + sizes.bins] for piece in packing[bin]]
        rows = [ids_of(piece.row, piece.stop, sizes) for piece in pieces]
        yield [PackedBatch.from_rows(rows).model_inputs()]


def padded_steps(sizes: Sizes) -> Iterator[list[Batch]]:
    """Several micro-batches a step: rows padded on the right to the longest of theirs."""
    import torch

    drawn = list(enumerate(lengths(sizes)))
    each = sizes.rows * sizes.micro
    for start in range(0, len(drawn) - each + 1, each):
        step: list[Batch] = []
        for at in range(start, start + each, sizes.rows):
            rows = [ids_of(row, n, sizes) for row, n in drawn[at : at + sizes.rows]]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [2] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            labels = ids.masked_fill(mask == 0, -100)
            step.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        yield step


def load_fast(who: str, path: str, sizes: Sizes, bits: int, checkpointing: bool) -> Model:
    """Hotloop's or Unsloth's FastLanguageModel, by the same calls; Hotloop's plan decides what it keeps."""
    fast = importlib.import_module(who.partition("-")[0]).FastLanguageModel
    placement = "auto" if who != "unsloth" else "unsloth" if checkpointing else False
    import torch

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    tokens = sizes.capacity * sizes.bins
    model, _ = fast.from_pretrained(
        path, max_seq_length=tokens, dtype=dtype, load_in_4bit=bits == 4, local_files_only=True
    )
    model = fast.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        target_modules=TARGETS,
        use_gradient_checkpointing=placement,
        random_state=1,
    )
    fast.for_training(model)
    return model


def load_hf(who: str, path: str, sizes: Sizes, bits: int, checkpointing: bool) -> Model:
    """Transformers + PEFT + bitsandbytes in bf16 under SDPA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    names = ("quant_type", "use_double_quant", "compute_dtype")
    options = dict(zip((f"bnb_4bit_{name}" for name in names), ("nf4", True, dtype), strict=True))
    quantised = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": 0} if cuda else None,
        attn_implementation="sdpa",
        quantization_config=quantised if bits == 4 else None,
    )
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(1)
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS)
    return get_peft_model(model, lora)


class Contestant:
    """A model with its optimizer, and one training step of it."""

    def __init__(self, model: Model) -> None:
        import torch

        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        optimizer: Any = torch.optim.AdamW
        if self.device.type == "cuda":
            import bitsandbytes

            optimizer = bitsandbytes.optim.AdamW8bit
        self.optimizer = optimizer(self.trained, lr=2e-4)

    def to_device(self, step: list[Batch]) -> list[Batch]:
        """What `hotloop.training.batches.collate` sends, where the model is; positions say where rows begin."""
        return [{k: batch[k].to(self.device) for k in INPUTS if k in batch} for batch in step]

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss over the trained tokens."""
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(**batch).loss

    def step(self, step: list[Batch], counts: list[int]) -> torch.Tensor:
        """Forward and backward of every micro-batch, then the optimizer; returns the loss of the step."""
        total = 0.0
        for batch, count in zip(step, counts, strict=True):
            loss = self.loss(batch) * (count / sum(counts))
            loss.backward()
            total = total + loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()


def train(contestant: Contestant, steps: Iterator[list[Batch]], seconds: float) -> Batch:
    """Trains until the time is over; batches are made between steps and not timed."""
    tokens = places = done = 0
    spent = 0.0
    losses: list[float] = []
    for number, step in enumerate(steps):
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in step]
        step = contestant.to_device(step)
        contestant.synchronise()
        begin = time.perf_counter()
        loss = contestant.step(step, counts)
        contestant.synchronise()
        took = time.perf_counter() - begin
        losses.append(round(float(loss), 4))
        if number < WARMUP:
            continue
        spent += took
        done += 1
        tokens += sum(int(b.get("attention_mask", b["input_ids"] >= 0).sum()) for b in step)
        places += sum(batch["input_ids"].numel() for batch in step)
        if spent >= seconds:
            break
    return {
        "useful_tok_s": round(tokens / spent),
        "tok_s": round(places / spent),
        "useful_share": round(tokens / places, 4),
        "tokens": tokens,
        "steps": done,
        "step_s": round(spent / done, 4),
        "loss": losses[:4],
    }


def keeps_rows_apart(contestant: Contestant, sizes: Sizes) -> bool:
    """Whether the loss of a row stays the same to the bit when the row before it is another."""
    import torch
    from hotloop_core.packing import PackedBatch

    length = sizes.dense[1]
    row = ids_of(2, length, sizes)
    losses = []
    for before in (0, 1):
        rows = [ids_of(before, length, sizes), row]
        batch = PackedBatch.from_rows(rows, labels=[[-100] * length, row]).model_inputs()
        with torch.no_grad():
            losses.append(float(contestant.loss(contestant.to_device([batch])[0])))
    return losses[0] == losses[1]


def overhead(contestant: Contestant, sizes: Sizes) -> Batch:
    """A packed batch beside a dense one of the same tokens and attention flops, in turn; medians."""
    import torch
    from hotloop_core.packing import PackedBatch

    rows, length = sizes.dense
    ragged = [length - 1 if row % 2 else length + 1 for row in range(rows)]
    packed = PackedBatch.from_rows([ids_of(i, n, sizes) for i, n in enumerate(ragged)])
    ids = torch.tensor([ids_of(row, length, sizes) for row in range(rows)])
    whole = ids.reshape(1, -1)
    batches = {
        "packed": packed.model_inputs(),
        "dense": {"input_ids": ids, "labels": ids},
        "one_sequence": {"input_ids": whole, "labels": whole},
    }
    batches = {name: contestant.to_device([batch]) for name, batch in batches.items()}
    times: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(8):
        for name, step in batches.items():
            contestant.synchronise()
            begin = time.perf_counter()
            contestant.step(step, [1])
            contestant.synchronise()
            if turn > 1:
                times[name].append(time.perf_counter() - begin)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "overhead": round(seconds["packed"] / seconds["dense"] - 1, 4),
        "overhead_s": {name: round(value, 4) for name, value in seconds.items()},
    }


def measure(who: str, contestant: Contestant, sizes: Sizes, seconds: float) -> Batch:
    """All that is asked of one contestant."""
    import torch

    if who in ("hf", "hotloop-padded"):
        row = train(contestant, padded_steps(sizes), seconds)
    else:
        row = {"rows_apart": keeps_rows_apart(contestant, sizes)}
        row |= train(contestant, packed_steps(sizes), seconds)
    if torch.cuda.is_available():
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        row["card"] = torch.cuda.get_device_name()
    return row | (overhead(contestant, sizes) if who == "hotloop" else {})


def contest(who: str, path: str, sizes: Sizes, seconds: float, tiny: bool) -> Batch:
    """Loads and measures one contestant in this process, without checkpointing if that fits."""
    if who == "unsloth":
        import unsloth  # noqa: F401 - it insists on being imported before transformers
    import torch

    load: Callable[..., Model] = load_hf if who == "hf" else load_fast
    row: Batch = {"bench": "packing", "who": who, "bits": 16 if tiny else 4, "tiny": tiny}
    for checkpointing in (False, True):
        begin = time.perf_counter()
        contestant = Contestant(load(who, path, sizes, row["bits"], checkpointing))
        row |= {"ckpt": checkpointing, "load_s": round(time.perf_counter() - begin, 1)}
        try:
            return row | measure(who, contestant, sizes, seconds)
        except torch.OutOfMemoryError:
            if "hotloop" in who:  # its plan decides what is kept: a second try would be the same
                break
        del contestant  # past the handler, whose traceback would keep its tensors
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row | {"oom": True}


def tiny_model(folder: str) -> str:
    """A Llama of two layers with random weights, and a tokenizer."""
    from hotloop_testkit.tiny import build, tokenizer
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    build(LlamaConfig(**sizes, num_attention_heads=4, vocab_size=300)).save_pretrained(folder)
    tokenizer(300).save_pretrained(folder)
    return folder


def versions() -> dict[str, str]:
    """Of what is installed."""
    installed = {d.name.lower() for d in metadata.distributions() if d.name}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}


def main() -> None:
    """One process for each contestant; the rows go to standard output and to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", nargs="?", help="a checkpoint with a tokenizer, such as an 8B Llama"
    )
    parser.add_argument("--who", help="one contestant, in this process")
    parser.add_argument("--contestants", default=",".join(WHO))
    parser.add_argument("--seconds", type=float, default=12.0, help="timed seconds of each")
    parser.add_argument("--out", type=Path, help="a .jsonl to append the rows to")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on any device")
    a = parser.parse_args()
    if not a.model and not a.tiny:
        parser.error("name a model, or pass --tiny to see that the script runs.")
    with tempfile.TemporaryDirectory() as folder:
        path = a.model or tiny_model(folder)
        if a.who:
            sizes = TINY if a.tiny else Sizes()
            print(
                json.dumps(
                    contest(a.who, path, sizes, a.seconds, a.tiny) | {"versions": versions()}
                )
            )
            return
        for who in a.contestants.split(","):
            if who == "unsloth" and importlib.util.find_spec("unsloth") is None:
                print(json.dumps({"bench": "packing", "who": who, "missing": "not installed"}))
                continue
            command = [sys.executable, __file__, path, "--who", who, "--seconds", str(a.seconds)]
            run = subprocess.run(
                command + ["--tiny"] * a.tiny, stdout=subprocess.PIPE, text=True, check=False
            )
            line = next(
                (x for x in run.stdout.splitlines()[::-1] if x.startswith('{"bench"')), None
            )
            line = line or json.dumps({"bench": "packing", "who": who, "failed": run.returncode})
            print(line, flush=True)
            if a.out and '"failed"' not in line:
                with a.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
