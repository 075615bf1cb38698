"""A tiny model with a small tokenizer of its own, trained on the quickstart's rows."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hotloop.training.recipe import Recipe, make_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = Path(str(resources.files("hotloop") / "data" / "hotloop_qa.jsonl"))


@pytest.fixture(scope="session")
def qa_records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in QUESTIONS.read_text().splitlines()]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, qa_records: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        (message["content"] for record in qa_records[:100] for message in record["messages"]),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(model_dir)


@pytest.fixture
def recipe(model_dir: Path, tmp_path: Path) -> Recipe:
    """Twelve steps of 256 tokens on sixty rows."""
    lines = QUESTIONS.read_text().splitlines(keepends=True)[:60]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return make_recipe(
        {
            "model": {"name": str(model_dir), "bits": 16, "max_seq_len": 256},
            "data": {"path": str(tmp_path / "rows.jsonl"), "held_out": 0.1},
            "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
            "schedule": {
                "steps": 12,
                "learning_rate": 1e-2,
                "save_every": 5,
                "eval_every": 5,
                "warmup": 2,
            },
            "output": {"directory": str(tmp_path / "run")},
        }
    )
