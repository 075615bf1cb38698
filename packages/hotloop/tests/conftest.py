"""Tiny checkpoints of real architecture, saved once for all tests of this folder, and a stand-in for CUDA graphs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tiny_tokenizer) -> Path:
    """A Llama of two layers, hidden size 64, in fp32, with its tokenizer. Read-only: copy it to
    change it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=304,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(1)
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


class Again:
    """Runs the work once more and puts what it gives where the first run's results lie."""

    def __init__(self, work):
        recording, backward = work.__self__, work.__name__ == "_run_backward"
        saved = copy.deepcopy(recording._run.saved) if backward else None
        self.work, self.found = work, work()
        if backward:
            recording._run.saved = saved  # only a replay uses it up

    def replay(self):
        for kept, made in zip(self.found, self.work(), strict=True):
            kept.copy_(made)


@pytest.fixture
def graphs_on_cpu(monkeypatch) -> None:
    """A stand-in for CUDA graphs on the CPU: it runs the recorded work again, on the same memory."""
    from hotloop_engine.blocks import graphs

    def capture(work, pool, device):
        made = Again(work)
        return made, made.found

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr("hotloop.wiring.root.can_record", lambda device: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
