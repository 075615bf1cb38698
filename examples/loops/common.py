"""What the loops share: a model with an adapter, some data, and a command line. Nothing here is Hotloop's."""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(name: str):
    """A transformers model with PEFT's adapters, and its tokenizer, as any script makes them."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(model, adapter), tokenizer


def questions(count: int = 32) -> list[tuple[str, str]]:
    """Questions about Hotloop, and their answers."""
    lines = (files("hotloop") / "data" / "hotloop_qa.jsonl").read_text(encoding="utf-8")
    chats = [json.loads(line)["messages"] for line in lines.splitlines()[:count]]
    return [(question["content"], answer["content"]) for question, answer in chats]


def batches(tokenizer, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """Padded batches of input_ids, attention_mask and labels [size, longest]; padding has the label -100."""
    texts = [f"{question}\n{answer}{tokenizer.eos_token}" for question, answer in questions()]
    made = []
    for start in range(0, len(texts), size):
        batch = tokenizer(texts[start : start + size], padding=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        made.append({name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    return made


def run(train: Callable[[str, int], list[float]], doc: str | None) -> None:
    """The command line of every loop."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    losses = train(arguments.model, arguments.steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
