import pytest
from hotloop_core import (
    API,
    Attention,
    ConfigKeys,
    FamilySpec,
    Glu,
    LayerSpec,
    Norms,
    facts_of,
)
from hotloop_core.errors import ConfigError, UnsupportedError

LAYER = LayerSpec(
    norms=Norms(before_attention="n1", before_mlp="n2"),
    attention=Attention(q="q", k="k", v="v", o="o", qkv_bias="attention_bias", q_norm="qn"),
    mlp=Glu(gate="g", up="u", down="d", bias=True),
)
KEYS = ConfigKeys(
    query_scale="query_pre_attn_scalar",
    attention_scale="attention_multiplier",
    attention_softcap="attn_logit_softcapping",
    logit_divisor="logits_scaling",
    window="sliding_window",
    use_window="use_sliding_window",
)
FAMILY = FamilySpec(
    api=API, name="made-up", model_types=frozenset({"made_up"}), layer=LAYER, keys=KEYS
)
CONFIG = {
    "model_type": "made_up",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}


def facts(**changes):
    config = {**CONFIG, **changes}
    return facts_of(FAMILY, {k: v for k, v in config.items() if v is not None})


def test_sizes_come_from_where_the_family_keeps_them():
    found = facts()
    assert (found.hidden_size, found.layers, found.kv_heads, found.head_dim) == (64, 4, 2, 8)
    assert found.activation == "gelu_tanh"
    assert found.linear_shapes() == {
        "q": (64, 64),
        "k": (16, 64),
        "v": (16, 64),
        "o": (64, 64),
        "gate": (96, 64),
        "up": (96, 64),
        "down": (64, 96),
    }
    assert found.layer_parameters == 64 * 64 * 2 + 16 * 64 * 2 + 96 * 64 * 3


def test_what_a_config_leaves_out_has_the_usual_meaning():
    found = facts(num_key_value_heads=None, max_position_embeddings=None)
    assert (found.kv_heads, found.max_positions, found.tied) == (8, 2048, False)
    assert (found.logit_divisor, found.residual_scale, found.attention_softcap) == (1.0, 1.0, None)
    assert found.rope == {"rope_type": "default", "rope_theta": 10000.0}


def test_biases_and_head_norms_come_from_the_description_and_the_config():
    assert (facts().qkv_bias, facts().o_bias, facts().mlp_bias) == (False, False, True)
    assert facts(attention_bias=True).qkv_bias
    assert facts().qk_norm


def test_an_explicit_head_size_wins_over_the_quotient():
    assert facts(head_dim=32).linear_shapes()["q"] == (256, 64)


def test_the_attention_scale_is_the_family_s_own_where_it_has_one():
    assert facts().attention_scale == 8**-0.5
    assert facts(query_pre_attn_scalar=256).attention_scale == 1 / 16
    assert facts(attention_multiplier=0.015).attention_scale == 0.015


def test_windows_follow_the_layer_types_and_the_switch():
    assert facts(sliding_window=128).windows == (None,) * 4
    assert facts(sliding_window=128, use_sliding_window=True).windows == (128,) * 4
    kinds = ["sliding_attention", "full_attention"] * 2
    found = facts(sliding_window=128, use_sliding_window=True, layer_types=kinds)
    assert found.windows == (128, None, 128, None)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
    ],
)
def test_rope_is_read_in_the_old_and_in_the_new_form(config):
    assert facts(**config).rope == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}


def test_rope_per_layer_type_is_read_in_the_old_and_in_the_new_form():
    old = facts(rope_theta=1e6, rope_local_base_freq=1e4).rope
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert old == nested == facts(rope_parameters=nested).rope


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"hidden_size": None}, "'hidden_size' is None"),
        ({"hidden_size": "64"}, "'hidden_size' is '64'"),
        ({"vocab_size": 0}, "'vocab_size' is 0"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"hidden_size": 65}, "not a multiple of num_attention_heads=8"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_their_key(changes, says):
    with pytest.raises(ConfigError, match=says):
        facts(**changes)


def test_an_activation_that_neither_config_nor_family_names_is_refused():
    with pytest.raises(ConfigError, match=r"no 'hidden_act', and the family 'made-up' no default"):
        facts(hidden_act=None)


def test_an_activation_that_the_engine_lacks_is_refused_with_those_it_has():
    with pytest.raises(UnsupportedError, match=r"'relu'.*silu"):
        facts(hidden_act="relu")
