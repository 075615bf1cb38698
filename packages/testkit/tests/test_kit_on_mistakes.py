"""Mistakes that a plugin's author makes: each is found by the check of the kit that is named beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hotloop import wiring
from hotloop.new_family import probe
from hotloop_core import Plugin, Registry, discover
from hotloop_testkit import description
from hotloop_testkit.description import DescriptionConformance
from hotloop_testkit.tiny import SMALL
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen3Config,
    StableLmConfig,
)

SIZES = {**SMALL, "num_hidden_layers": 3}
SAME_HEADS = {**SIZES, "num_key_value_heads": 4}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA2 = {**SIZES, **CAPS, "head_dim": 32, "query_pre_attn_scalar": 5, "sliding_window": 9}
MULTIPLIERS = {"attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 4.0}

COVERED = "every_layer_is_covered_and_nothing_is_claimed_twice"
NAMED = "every_module_and_op_that_a_layer_names_is_there"
FACTS = "the_facts_are_those_of_the_model"
FOUND = "the_registry_finds_the_family"
SHOWS = "the_tiny_config_can_show_mistakes"
KEYS = "every_key_that_the_description_names_is_one_of_the_config"
ABSENT = "a_config_json_without_a_key_is_read_as_transformers_reads_it"
SAME = "far_from_the_start_the_same_is_computed"
SEEN = "differ by|config says"
"""In what is computed; or wiring has seen it in the model's own modules before."""
UNSEEN = "no_other_value_of_the_config_changes_a_layer_unseen"


def layer(**changes):
    return lambda spec: replace(spec, layer=replace(spec.layer, **changes))


def attention(**changes):
    return lambda spec: layer(attention=replace(spec.layer.attention, **changes))(spec)


def mlp(**changes):
    return lambda spec: layer(mlp=replace(spec.layer.mlp, **changes))(spec)


def norms(**changes):
    return lambda spec: layer(norms=replace(spec.layer.norms, **changes))(spec)


def keys(**changes):
    return lambda spec: replace(spec, keys=replace(spec.keys, **changes))


def family(**changes):
    return lambda spec: replace(spec, **changes)


def only_the_first(spec):
    """Says of every layer but the first that its heads are not turned."""
    other = replace(spec.layer, attention=replace(spec.layer.attention, rotary=False))
    return replace(spec, layer=lambda _, index: other if index else spec.layer)


MISTAKES = {
    "a path with a slip": (
        LlamaConfig,
        SIZES,
        attention(q="self_attn.qproj"),
        COVERED,
        "no self_attn.qproj",
    ),
    "a path twice": (LlamaConfig, SIZES, attention(k="self_attn.q_proj"), COVERED, "q_proj twice"),
    "a norm forgotten": (LlamaConfig, SIZES, norms(before_mlp=None), COVERED, "does not claim"),
    "q/k norms forgotten": (
        Qwen3Config,
        SIZES,
        attention(q_norm=None, k_norm=None),
        COVERED,
        "q_norm",
    ),
    "no head": (LlamaConfig, SIZES, family(head="head"), COVERED, "lm_head"),
    "no such module": (LlamaConfig, SIZES, attention(module="attn"), NAMED, "module='attn'"),
    "no such op": (
        LlamaConfig,
        SIZES,
        layer(ops={"gluu": "mine"}),
        NAMED,
        "no op is called 'gluu'",
    ),
    "a bias forgotten": (
        LlamaConfig,
        {**SIZES, "attention_bias": True},
        attention(qkv_bias=False),
        FACTS,
        "has a bias",
    ),
    "another key of a size": (
        Qwen3Config,
        SIZES,
        keys(head_dim="size"),
        FACTS,
        "by the config's keys",
    ),
    "q for k": (
        LlamaConfig,
        SIZES,
        attention(q="self_attn.k_proj", k="self_attn.q_proj"),
        FACTS,
        r"k_proj \(q\)",
    ),
    "a type as text": (
        LlamaConfig,
        SIZES,
        family(model_types="llama"),
        FOUND,
        "expected a frozenset",
    ),
    "one layer": (LlamaConfig, {**SIZES, "num_hidden_layers": 1}, family(), SHOWS, "1 layer"),
    "a long window": (
        MistralConfig,
        {**SIZES, "sliding_window": 64},
        family(),
        SHOWS,
        "hides nothing",
    ),
    "a key with a slip": (
        GraniteConfig,
        SIZES,
        keys(residual_scale="residual"),
        KEYS,
        "no residual",
    ),
    "a refusal with a slip": (
        StableLmConfig,
        SIZES,
        keys(refused={"use_parallel": "side by side"}),
        KEYS,
        "no use_parallel",
    ),
    "a default forgotten": (
        MistralConfig,
        SIZES,
        keys(defaults={}),
        ABSENT,
        "takes .*'num_key_value_heads': 8",
    ),
    "a default of the rotation forgotten": (
        GlmConfig,
        SIZES,
        keys(defaults={}),
        ABSENT,
        "takes .*'rope_theta': 10000.0, 'partial_rotary_factor': 0.5",
    ),
    "k for q, as wide": (
        LlamaConfig,
        SAME_HEADS,
        attention(q="self_attn.k_proj", k="self_attn.q_proj"),
        SAME,
        SEEN,
    ),
    "up for gate": (
        LlamaConfig,
        SIZES,
        mlp(gate="mlp.up_proj", up="mlp.gate_proj"),
        SAME,
        SEEN,
    ),
    "norms exchanged": (
        LlamaConfig,
        SIZES,
        norms(before_attention="post_attention_layernorm", before_mlp="input_layernorm"),
        SAME,
        SEEN,
    ),
    "norms before for behind": (
        Olmo2Config,
        SAME_HEADS,
        norms(
            before_attention="post_attention_layernorm",
            before_mlp="post_feedforward_layernorm",
            after_attention=None,
            after_mlp=None,
        ),
        SAME,
        SEEN,
    ),
    "1 + w": (LlamaConfig, SIZES, norms(offset=1.0), SAME, SEEN),
    "w for 1 + w": (GemmaConfig, {**SIZES, "head_dim": 32}, norms(offset=0.0), SAME, SEEN),
    "another norm": (LlamaConfig, SIZES, norms(kind="layer"), SAME, SEEN),
    "an epsilon elsewhere": (
        StableLmConfig,
        SIZES,
        keys(norm_eps="rms_norm_eps"),
        FACTS,
        "epsilon",
    ),
    "another activation": (LlamaConfig, SIZES, keys(activations={"silu": "gelu"}), SAME, SEEN),
    "pairs for halves": (LlamaConfig, SIZES, attention(interleaved=True), SAME, SEEN),
    "halves for pairs": (
        GlmConfig,
        {**SIZES, "head_dim": 16},
        attention(interleaved=False),
        SAME,
        SEEN,
    ),
    "layers alike": (LlamaConfig, SIZES, only_the_first, SAME, SEEN),
    "a scale forgotten": (
        GraniteConfig,
        {**SIZES, **MULTIPLIERS},
        keys(residual_scale=None),
        SAME,
        SEEN,
    ),
    "scales exchanged": (
        GraniteConfig,
        {**SIZES, **MULTIPLIERS},
        keys(attention_scale="residual_multiplier", residual_scale="attention_multiplier"),
        SAME,
        SEEN,
    ),
    "a scale forgotten that is one here": (
        GraniteConfig,
        SIZES,
        keys(residual_scale=None),
        UNSEEN,
        "residual_multiplier",
    ),
    "another scale of scores": (Gemma2Config, GEMMA2, keys(query_scale=None), SAME, SEEN),
    "a soft cap forgotten": (Gemma2Config, GEMMA2, keys(attention_softcap=None), SAME, SEEN),
    "a window forgotten": (
        MistralConfig,
        {**SIZES, "sliding_window": 9},
        keys(window=None),
        SAME,
        SEEN,
    ),
    "a window forgotten that is off here": (
        MistralConfig,
        {**SIZES, "sliding_window": None},
        keys(window=None),
        UNSEEN,
        "sliding_window=9",
    ),
    "another dropout forgotten": (
        StableLmConfig,
        SIZES,
        keys(refused={}),
        UNSEEN,
        "hidden_dropout=0.5",
    ),
    "a dropout forgotten": (
        LlamaConfig,
        SIZES,
        keys(attention_dropout=None),
        UNSEEN,
        "attention_dropout=0.5",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, monkeypatch):
    config_class, arguments, change, check, message = MISTAKES[mistake]
    config = config_class(**arguments)
    wrong = change(discover().match(config.to_dict()))
    plugin = Plugin(name="mine", distribution="mine", version="1", families=(wrong,))
    for module in (description, wiring, probe):
        monkeypatch.setattr(module, "discover", lambda: Registry((plugin,)))
    members = {"spec": wrong, "tiny_config": lambda self: config_class(**arguments)}
    suite = type("Mine", (DescriptionConformance,), members)()
    with pytest.raises(Exception, match=message):
        getattr(suite, f"test_{check}")()
