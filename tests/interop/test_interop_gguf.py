"""GGUF files of ours, read and run by llama.cpp itself: numbers and storage types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hotloop.exporting import export
from hotloop_gguf.mixes import MIXES
from transformers import LlamaConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Tiny = Callable[..., Any]
    Logits = Callable[..., torch.Tensor]
    InBoth = Callable[..., tuple[torch.Tensor, torch.Tensor, Any]]

pytest.importorskip("llama_cpp", reason="needs the interop group: llama-cpp-python")


def divergence(truth: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(truth || found) over positions, in nats."""
    p, q = truth.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def rope(kind: str, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | parameters}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4, "head_dim": 32},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        rope("default", rope_theta=5e5),
        rope("linear", factor=4.0),
        rope("dynamic", factor=4.0),
        rope(
            "llama3", rope_theta=5e3, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        rope("yarn", factor=4.0, original_max_position_embeddings=64),
        rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.8),
    ],
    ids=lambda c: "-".join(
        f"{k}={v['rope_type'] if isinstance(v, dict) else v}" for k, v in c.items()
    )
    or "plain",
)  # fmt: skip
def test_f32_file_computes_what_transformers_computes(
    changes: dict[str, Any], tiny: Tiny, in_both: InBoth
) -> None:
    truth, found, _ = in_both(tiny(LlamaConfig, **changes))
    assert (found - truth).abs().max() < 1e-4 * truth.abs().max()


LIMITS = {
    "f32": 1e-9, "f16": 1e-5, "bf16": 2e-4, "q8_0": 2e-3, "mxfp4": 2e-3, "q6_k": 1e-2,
    "q5_k_m": 3e-2, "q5_k_s": 3e-2, "q5_1": 4e-2, "q5_0": 5e-2, "q4_k_m": 0.13, "q4_k_s": 0.13,
    "iq4_xs": 0.14, "iq4_nl": 0.14, "q4_1": 0.15, "q4_0": 0.17, "q3_k_l": 0.3, "q3_k_m": 0.3,
    "q3_k_s": 0.4, "q2_k": 0.8,
}  # fmt: skip
"""Mean KL in nats, twice what is measured. MXFP4 is for experts, of which this model has none."""


def test_every_storage_type_loads_and_stays_within_its_rounding(
    tiny: Tiny,
    tokenizer: Any,
    hf_logits: Logits,
    llama_cpp_logits: Logits,
    tmp_path: Path,
) -> None:
    model = tiny(LlamaConfig, hidden_size=256, intermediate_size=512, initializer_range=0.06)
    report = export(model, tokenizer, tmp_path, format="gguf", quant=list(MIXES), name="tiny")
    truth = hf_logits(model)
    measured = {
        quant: divergence(truth, llama_cpp_logits(file.path))
        for quant, file in zip(MIXES, report.files, strict=True)
    }
    assert {q: kl for q, kl in measured.items() if not kl < LIMITS[q]} == {}
    assert measured["q8_0"] < measured["q6_k"] < measured["q5_k_m"] < measured["q4_k_m"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9},
        {"hidden_size": 96, "intermediate_size": 256, "tie_word_embeddings": True},
    ],
    ids=["wide", "narrow-tied"],
)
def test_each_tensor_has_the_type_that_llama_cpps_quantiser_gives_it(
    sizes: dict[str, Any], tiny: Tiny, assert_quantised_as_llama_cpp_does: Callable[[Any], None]
) -> None:
    assert_quantised_as_llama_cpp_does(tiny(LlamaConfig, **sizes))


def test_adapter_is_merged_into_the_file(
    adapted: Tiny, tiny: Tiny, hf_logits: Logits, in_both: InBoth
) -> None:
    model = tiny(LlamaConfig)
    before = hf_logits(model)
    truth, found, _ = in_both(adapted(model))
    assert (truth - before).abs().max() > 0.1
    assert (found - truth).abs().max() < 1e-4 * truth.abs().max()


def test_embedding_rows_beyond_the_tokenizer_are_padded(
    tiny: Tiny, tokenizer: Any, in_both: InBoth
) -> None:
    truth, found, _ = in_both(tiny(LlamaConfig, vocab_size=len(tokenizer) + 29))
    assert torch.allclose(found, truth, atol=1e-3)
