"""Hyperparameters, names, transforms and storage types from a family's description."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hotloop_core import ExportFacts, TensorEntry, discover, facts_of
from hotloop_core.errors import UnsupportedError
from hotloop_gguf.metadata import hyperparameters, notes, rope_factors
from hotloop_gguf.mixes import MIXES, storage
from hotloop_gguf.names import tensor_name
from hotloop_gguf.transforms import add_one, rope_interleave, transform_named
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA = discover().match({"model_type": "llama"})
FACTS = LLAMA.exports["gguf"]


def model(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    return facts_of(LLAMA, LlamaConfig(**(sizes | changes)).to_dict())


def entry(role: str, shape: tuple[int, ...], layer: int | None = 0, part: str = "weight") -> Any:
    return TensorEntry(
        name=f"x.{role}.{part}", role=role, part=part, layer=layer, shape=shape, dtype="float32",
        load=lambda: torch.zeros(shape),
    )  # fmt: skip


def test_rope_factors_are_those_that_transformers_divides_by() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2).double() / 128)
    factors = rope_factors(facts_of(LLAMA, config.to_dict()))["rope_freqs.weight"]
    torch.testing.assert_close(
        torch.tensor(factors, dtype=torch.float64), plain / scaled, rtol=2e-6, atol=0
    )


def test_hyperparameters_carry_the_sizes_and_the_familys_own_keys() -> None:
    keys = hyperparameters(model(rms_norm_eps=1e-5, max_position_embeddings=4096), FACTS)
    assert keys["llama.embedding_length"] == 512 and keys["llama.block_count"] == 16
    assert keys["llama.attention.head_count_kv"] == 2 and keys["llama.context_length"] == 4096
    assert keys["llama.rope.dimension_count"] == 64 and keys["llama.vocab_size"] == 32000
    assert keys["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert not any("scaling" in key for key in keys)


def test_a_family_reads_config_keys_and_gives_literals() -> None:
    facts = ExportFacts(
        architecture="a", metadata={"x": "config.hidden_act", "y": 3.5, "z": "attention_softcap"}
    )
    keys = hyperparameters(model(), facts)
    assert keys["a.x"] == "silu" and keys["a.y"] == 3.5 and "a.z" not in keys


def test_a_whole_number_is_a_float_where_llama_cpp_reads_one() -> None:
    metadata = {"embedding_scale": "config.num_hidden_layers", "x": "config.num_hidden_layers"}
    keys = hyperparameters(model(), ExportFacts(architecture="a", metadata=metadata))
    assert (keys["a.embedding_scale"], keys["a.x"]) == (16.0, 16)
    assert [type(keys[f"a.{key}"]) for key in metadata] == [float, int]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logit_softcap": 30.0}, "logit_softcap=30.0"),
        ({"residual_scale": 0.2}, "residual_scale"),
        ({"attention_scale": 0.5}, "attention_scale"),
        ({"activation": "gelu"}, "activation=gelu"),
        ({"rope": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "beta_fast": 9}}, "beta"),
    ],
)
def test_what_the_architecture_cannot_say_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        hyperparameters(replace(model(), **change), FACTS)


def family_model(model_type: str, **config: Any) -> tuple[Any, ExportFacts]:
    sizes = {
        "hidden_size": 4608,
        "intermediate_size": 1024,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "vocab_size": 320,
        "head_dim": 128,
    }
    family = discover().match({"model_type": model_type})
    facts = facts_of(family, {"model_type": model_type, **sizes, **config})
    return facts, family.exports["gguf"]


@pytest.mark.parametrize(
    "model_type, layers, hidden", [("gemma2", 46, 4608), ("gemma3_text", 62, 5376)]
)
def test_the_attention_scale_of_gemma_27b_needs_no_key_and_another_one_is_refused(
    model_type: str, layers: int, hidden: int
) -> None:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden}
    scale = {"query_pre_attn_scalar": hidden // 32}
    assert hyperparameters(*family_model(model_type, **sizes, **scale))
    for wrong in (sizes | {"query_pre_attn_scalar": 128}, scale | {"num_hidden_layers": 26}):
        with pytest.raises(UnsupportedError, match="attention_scale"):
            hyperparameters(*family_model(model_type, **wrong))


@pytest.mark.parametrize("model_type", ["gemma", "gemma2"])
def test_an_untied_gemma_1_or_2_is_refused_by_name(model_type: str) -> None:
    scale = {"query_pre_attn_scalar": 144}
    assert hyperparameters(*family_model(model_type, **scale))
    with pytest.raises(UnsupportedError, match=f"tied=False.*'{model_type}'.*takes True"):
        hyperparameters(*family_model(model_type, **scale, tie_word_embeddings=False))


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_gemma_2_without_a_soft_cap_is_refused_since_readers_assume_one(cap: str) -> None:
    with pytest.raises(UnsupportedError, match=f"llama.cpp takes .*0 where .*'{cap}'"):
        hyperparameters(*family_model("gemma2", query_pre_attn_scalar=144, **{cap: None}))


@pytest.mark.parametrize(
    "model_type, window, told",
    [
        ("mistral", {"sliding_window": 4096}, "46 of 46 layers see only the last 4,096"),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 32768}, None),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 40}, "6 of 46"),
        ("qwen2", {}, None),
        ("gemma2", {"query_pre_attn_scalar": 144, "sliding_window": 9}, None),
    ],
)
def test_a_window_that_the_architecture_cannot_say_is_noted(
    model_type: str, window: dict[str, Any], told: str | None
) -> None:
    found = notes(*family_model(model_type, max_position_embeddings=32768, **window))
    assert found == [] if told is None else told in found[0]


def test_a_misnamed_field_is_refused_with_what_to_write() -> None:
    facts = ExportFacts(architecture="a", metadata={"x": "hidden"})
    with pytest.raises(UnsupportedError, match=r"'hidden'.*'config\.NAME'"):
        hyperparameters(model(), facts)


def test_names_come_from_the_role_and_a_family_overrides_single_ones() -> None:
    assert tensor_name(entry("o", (4, 4), 7), FACTS) == "blk.7.attn_output.weight"
    assert tensor_name(entry("q", (4,), 0, "bias"), FACTS) == "blk.0.attn_q.bias"
    assert tensor_name(entry("embedding", (4, 4), None), FACTS) == "token_embd.weight"
    other = ExportFacts(architecture="a", names={"o": "blk.{layer}.out"})
    assert tensor_name(entry("o", (4, 4), 7), other) == "blk.7.out.weight"
    with pytest.raises(UnsupportedError, match="role 'other'"):
        tensor_name(entry("other", (4, 4)), FACTS)


def test_interleaving_pairs_the_halves_of_each_head() -> None:
    facts = replace(model(), heads=2, kv_heads=1, head_dim=4)
    rows = torch.arange(8).reshape(8, 1)
    assert rope_interleave(rows, facts).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rope_interleave(torch.arange(4), facts).tolist() == [0, 2, 1, 3]


def test_add_one_is_exact_where_bfloat16_would_round() -> None:
    weight = torch.tensor([2**-10], dtype=torch.bfloat16)
    assert add_one(weight, model()).item() == 1 + 2**-10


def test_an_unknown_transform_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"'twist'.*add_one"):
        transform_named("twist")


def chosen(
    mix: str, role: str, shape: tuple[int, ...], layer: int | None = 5, **options: Any
) -> str:
    settings = {"tied": False, "model": model()} | options
    return storage(
        MIXES[mix], entry(role, shape, layer), settings["model"], tied=settings["tied"]
    ).block.name


def test_q4_k_m_gives_more_bits_to_the_layers_that_need_them() -> None:
    more = [i for i in range(16) if chosen("q4_k_m", "down", (512, 1024), i) == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert [i for i in range(16) if chosen("q4_k_m", "v", (128, 512), i) == "Q6_K"] == more
    assert {chosen("q4_k_m", role, (512, 512), 0) for role in ("q", "k", "o", "gate", "up")} == {
        "Q4_K"
    }


def test_the_output_has_more_bits_and_so_has_a_tied_embedding() -> None:
    shape = (32000, 512)
    assert chosen("q4_k_m", "head", shape, None) == "Q6_K"
    assert chosen("q4_k_m", "embedding", shape, None) == "Q4_K"
    assert chosen("q4_k_m", "embedding", shape, None, tied=True) == "Q6_K"
    assert chosen("q8_0", "head", shape, None) == "Q8_0"
    assert chosen("bf16", "head", shape, None) == "BF16"


def test_vectors_and_norms_and_routers_stay_float32() -> None:
    for mix in MIXES:
        assert chosen(mix, "q", (512,)) == "F32"
        assert chosen(mix, "before_mlp", (512,)) == "F32"
        assert chosen(mix, "router", (8, 512)) == "F32"


def test_a_width_that_no_block_divides_falls_back_and_says_so() -> None:
    choice = storage(MIXES["q4_k_m"], entry("q", (64, 96)), model(), tied=False)
    assert (choice.block.name, choice.wanted) == ("Q5_0", "Q4_K")
    choice = storage(MIXES["q8_0"], entry("q", (64, 40)), model(), tied=False)
    assert (choice.block.name, choice.wanted) == ("F16", "Q8_0")
