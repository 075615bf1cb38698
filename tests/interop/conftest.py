"""Tiny models of every family, and what transformers and llama.cpp compute of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hotloop_testkit.numerics import relative_error
from hotloop_testkit.tiny import tokenizer as byte_tokenizer

VOCABULARY = 320
PROMPT = list(range(3, 60)) * 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
Logits = Callable[..., torch.Tensor]
InBoth = Callable[..., tuple[torch.Tensor, torch.Tensor, Any]]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer of VOCABULARY tokens."""
    return byte_tokenizer(VOCABULARY)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """Makes a model of a config class: SIZES and changes to them, norms and biases drawn, eager attention."""
    from transformers import AutoModelForCausalLM

    def make(config: type[Any], **changes: Any) -> Any:
        torch.manual_seed(1)
        made = config(**{**SIZES, **changes})
        model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
        centre = 0.0 if "gemma" in made.model_type else 1.0
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                mean = centre if name.endswith("norm.weight") else 0.0
                torch.nn.init.normal_(parameter, mean=mean, std=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def adapted() -> Callable[..., Any]:
    """Puts adapters on a model that change what it computes."""
    from peft import LoraConfig, get_peft_model

    def adapt(model: Any, std: float = 0.05, **options: Any) -> Any:
        settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **options}
        model = get_peft_model(model, LoraConfig(**settings)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                torch.nn.init.normal_(parameter, std=std)
        return model

    return adapt


@pytest.fixture(scope="session")
def hf_logits() -> Logits:
    """What transformers computes for PROMPT, [tokens, vocabulary] in fp32."""

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([PROMPT])).logits[0].float()

    return logits


@pytest.fixture(scope="session")
def llama_cpp_logits() -> Logits:
    """What llama.cpp computes for PROMPT from a file, or from an adapter's file on its base's."""
    from hotloop.exporting.check import LlamaCpp

    def logits(path: Path, base: Path | None = None) -> torch.Tensor:
        with LlamaCpp(path, base=base) as llama:
            return llama.logits(PROMPT)

    return logits


@pytest.fixture
def in_both(tokenizer: Any, hf_logits: Logits, llama_cpp_logits: Logits, tmp_path: Path) -> InBoth:
    """Writes a model's f32 file, or its adapter's for the file `base`; the bound between the two is the test's.

    Gives what transformers computes of the model, what llama.cpp computes of the file, and the export's report.
    """
    from hotloop.exporting import export

    def compute(model: Any, base: Path | None = None, **options: Any) -> Any:
        truth = hf_logits(model)
        asked = {"quant": "adapter" if base else "f32", "name": "tiny", **options}
        report = export(model, tokenizer, tmp_path, format="gguf", **asked)
        return truth, llama_cpp_logits(report.files[0].path, base), report

    return compute


@pytest.fixture(scope="session")
def assert_comes_back(hf_logits: Logits) -> Callable[..., None]:
    """Loads an f32 file and expects what its model computes, and the model type and other keys of its config."""
    from hotloop.loading import load

    def check(path: Path, model: Any, truth: torch.Tensor, *keys: str) -> None:
        again, _ = load(path, bits=16, max_seq_len=64, wire=False, device="cpu", attn="eager")
        assert relative_error(hf_logits(again), truth) < 1e-6
        for key in ("model_type", *keys):
            assert getattr(again.config, key) == getattr(model.config, key), key

    return check


@pytest.fixture
def assert_quantised_as_llama_cpp_does(tokenizer: Any, tmp_path: Path) -> Callable[[Any], None]:
    """Exports a model in every mix and compares each tensor's type with what llama.cpp makes of the f32 file."""
    import llama_cpp
    from gguf import GGUFReader
    from hotloop.exporting import export
    from hotloop_gguf.mixes import MIXES

    def types(path: Path) -> dict[str, str]:
        return {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}

    def check(model: Any) -> None:
        quants = [name for name in MIXES if name != "f32"]
        asked = ["f32", *quants]
        report = export(model, tokenizer, tmp_path, format="gguf", quant=asked, name="tiny")
        source = str(report.files[0].path).encode()
        theirs = tmp_path / "theirs.gguf"
        for quant, file in zip(quants, report.files[1:], strict=True):
            parameters = llama_cpp.llama_model_quantize_default_params()
            parameters.ftype, parameters.nthread = MIXES[quant].number, 1
            assert not llama_cpp.llama_model_quantize(
                source, str(theirs).encode(), ctypes.byref(parameters)
            )
            assert types(file.path) == types(theirs), quant

    return check
