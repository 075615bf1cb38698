"""`hotloop new-family`: what it reads out of transformers' models, what it refuses, what it writes."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from dataclasses import replace

import pytest
import typer
from hotloop.cli.new_family import new_family as command
from hotloop.new_family import guess, new_family
from hotloop.new_family.absent import ROPE, taken
from hotloop.new_family.project import run_kit
from hotloop.new_family.tiny import Tiny
from hotloop.wiring.classes import STATE
from hotloop_core import Registry, discover, facts_of
from hotloop_core.errors import ConfigError, OutputExistsError, UnsupportedError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

FREE = "seed_oss"
"""A type that no plugin of this project claims."""
NEW = {"internlm3", "lfm3", "granite_swa", "seed_oss", "ernie4_5", "minicpm3", "ministral3", "cwm"}
"""Types that the oldest transformers that we support may not have."""

READ = (
    "norm_eps",
    "activation",
    "attention_softcap",
    "query_scale",
    "attention_scale",
    "logit_softcap",
    "logit_divisor",
    "residual_scale",
    "window",
    "use_window",
    "window_start",
)


SAID = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite"),
    "stablelm",
    *("phi3", "glm", "glm4", "olmo2", "olmo3"),
)
"""Types whose layers are of one kind, and that plugins of this project describe."""


@pytest.mark.parametrize("model_type", SAID)
def test_a_guess_says_what_the_plugin_of_that_family_says(model_type):
    known = discover().match({"model_type": model_type})
    guessed = guess(model_type).family
    assert guessed.layer == known.layer
    assert {name: getattr(guessed.keys, name) for name in READ} == {
        name: getattr(known.keys, name) for name in READ
    }
    for name in ("decoder", "layers", "embedding", "final_norm", "head"):
        assert getattr(guessed, name) == getattr(known, name)


def need(model_type):
    if model_type in NEW and model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")


def test_interleaved_rotations_and_switches_of_biases_are_found():
    need("internlm3")
    ernie, seed, intern = (guess(name).family for name in ("ernie4_5", FREE, "internlm3"))
    assert ernie.layer.attention.interleaved and ernie.layer.mlp.bias == "use_bias"
    assert ernie.keys.defaults["rope_theta"] == 5e5  # of a config.json that does not say it
    assert (intern.layer.attention.o_bias, intern.layer.mlp.bias) == ("attention_bias", "mlp_bias")
    assert seed.layer.attention.o_bias == "attention_out_bias"
    assert seed.keys.refused.keys() == {"residual_dropout"}


def test_a_rotation_that_the_configs_class_fills_in_is_said_by_its_older_keys():
    need("cwm")
    found = taken(Tiny(config_class=CONFIG_MAPPING["cwm"], arguments={}), ROPE)
    whole = CONFIG_MAPPING["cwm"]().to_dict()
    file = {key: value for key, value in whole.items() if key != ROPE}
    family = discover().match({"model_type": "llama"})
    read = replace(family, keys=replace(family.keys, defaults=found))
    assert facts_of(read, file).rope == facts_of(family, whole).rope
    own = {**file, "rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert facts_of(read, own).rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}


@pytest.mark.parametrize(
    "model_type, reasons",
    [
        ("llamma", ["no model_type='llamma'", "Did you mean 'llama'"]),
        ("gemma3", ["made of several models", "text_config is 'gemma3_text'"]),
        ("bert_generation_x", ["no model_type='bert_generation_x'"]),
        ("t5", ["an encoder and a decoder"]),
        ("albert", ["no ...ForCausalLM"]),
        ("mixtral", ["routes tokens to experts (model.layers.0.mlp.experts)"]),
        ("dbrx", ["routes tokens to experts (moe_"]),
        ("minicpm3", ["latent attention"]),
        ("lfm3", ["'conv' is Lfm3ShortConv in layer 0 and None in layer 2"]),
        ("cohere", ["parallel residual", "multiplied by 'logit_scale'", "stand in turn"]),
        ("starcoder2", ["an MLP without a gate (mlp.c_fc (96, 64), mlp.c_proj (64, 96))"]),
        ("persimmon", ["rows are q, k and v of one head after the other", "without a gate"]),
        ("gpt_neox", ["parallel residual", "rows are q, k and v of one head after the other"]),
        ("hunyuan_v1_dense", ["self_attn.query_layernorm, a norm behind the rotation"]),
        ("bitnet", ["between the heads and their output projection", "a norm inside the MLP"]),
        ("granite_swa", ["attention that is not softmax", "self_attn.sinks"]),
        ("mpt", ["positions that do not come to the layer as a rotation"]),
        ("opt", ["fc1 (in the layer itself)"]),
        ("gpt2", ["another class than nn.Linear: Conv1D"]),
        ("ministral3", ["attention that changes with a token's position"]),
    ],
)
def test_what_no_description_says_is_refused_with_every_reason(model_type, reasons, tmp_path):
    need(model_type)
    with pytest.raises(UnsupportedError) as refusal:
        new_family(model_type, tmp_path / "plugin", kit=False)
    assert [reason for reason in reasons if reason not in str(refusal.value)] == []
    assert not (tmp_path / "plugin").exists()


@pytest.mark.parametrize("model_type", ["smollm3", "exaone4"])
def test_layers_that_turn_their_heads_differently_are_told_apart(model_type):
    with pytest.raises(UnsupportedError) as refusal:
        guess(model_type)
    assert "heads turn in halves in layer 0 and not at all in layer 3" in str(refusal.value)


def heads(x, *, of):
    """q, k, v [B, T, heads, K] in the order that `of` names; by = one head after the other."""
    rows = x.unflatten(-1, (-1, 16))
    if of == "by":
        q, k, v = rows.unflatten(-2, (2, 4)).split([2, 1, 1], dim=-2)
        return q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
    parts = dict(zip(of, rows.split([4 if each == "q" else 2 for each in of], dim=-2), strict=True))
    return parts["q"], parts["k"], parts["v"]


@pytest.mark.parametrize(
    "order, reason",
    [
        ("qkv", None),
        ("kqv", "self_attn.qkv_proj, whose rows are all of k, then q, then v, not all of q"),
        ("vkq", "all of v, then k, then q"),
        ("by", "q, k and v of one head after the other"),
    ],
)
def test_the_order_of_rows_in_a_fused_projection_is_told_by_what_it_computes(
    order, reason, monkeypatch
):
    from transformers.models.phi3 import modeling_phi3 as phi3

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **_):
        q, k, v = (x.transpose(1, 2) for x in heads(self.qkv_proj(hidden_states), of=order))
        q, k = phi3.apply_rotary_pos_emb(q, k, *position_embeddings)
        o, _ = phi3.eager_attention_forward(self, q, k, v, attention_mask, scaling=self.scaling)
        return self.o_proj(o.flatten(2)), None

    monkeypatch.setattr(phi3.Phi3Attention, "forward", forward)
    if reason is None:
        assert guess("phi3").family.layer.attention.qkv == "self_attn.qkv_proj"
        return
    with pytest.raises(UnsupportedError) as refusal:
        guess("phi3")
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    "rows, reason",
    [
        (lambda x: x.chunk(2, -1)[::-1], "mlp.gate_up_proj, whose rows are up, then gate"),
        (lambda x: (x[..., ::2], x[..., 1::2]), "whose rows are gate and up by turns"),
        (lambda x: (x[..., ::2].relu(), x[..., 1::2]), "that is not act(gate) · up"),
    ],
)
def test_up_before_gate_is_told_by_what_it_computes(rows, reason, monkeypatch):
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    def forward(self, x):
        gate, up = rows(self.gate_up_proj(x))
        return self.down_proj(up * self.activation_fn(gate))

    monkeypatch.setattr(Phi3MLP, "forward", forward)
    with pytest.raises(UnsupportedError) as refusal:
        guess("phi3")
    assert reason in str(refusal.value)


def test_a_difference_that_no_experiment_looked_for_is_refused(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    own = LlamaModel.forward

    def forward(self, *args, **kwargs):
        outputs = own(self, *args, **kwargs)
        wired = STATE in self.layers[0].__dict__
        outputs.last_hidden_state = outputs.last_hidden_state * (1.0 + 0.01 * wired)
        return outputs

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(UnsupportedError, match="the experiments missed: wired, its results differ"):
        guess("llama")


@pytest.mark.parametrize("model_type", ["phi3", "glm4", "olmo3"])
def test_a_key_that_a_config_json_lacks_is_read_as_transformers_reads_it(model_type):
    made = guess(model_type)
    keys = ("rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "head_dim")
    keys += ("tie_word_embeddings", "sliding_window", "layer_types")
    for key in keys:
        arguments = {name: value for name, value in made.tiny.arguments.items() if name != key}
        config = made.tiny.config_class(**arguments).to_dict()
        lacking = {name: value for name, value in config.items() if name != key}
        found, expected = (facts_of(made.family, each) for each in (lacking, config))
        assert replace(found, config={}) == replace(expected, config={}), key


def test_the_package_holds_the_guess(tmp_path, monkeypatch):
    made = new_family(FREE, tmp_path / "plugin", kit=False)
    monkeypatch.syspath_prepend(str(made.directory / "src"))
    module = importlib.import_module(f"hotloop_{FREE}")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert module.hotloop_families() == [made.guess.family]
    with pytest.raises(OutputExistsError, match="exists"):
        new_family(FREE, made.directory, kit=False)


def test_a_type_that_is_installed_is_not_written_again(tmp_path):
    with pytest.raises(ConfigError, match="handled by the installed family 'llama'"):
        new_family("llama", tmp_path / "plugin", kit=False)


def test_a_type_that_a_plugin_of_this_project_has_is_installed_and_not_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("hotloop.new_family.project.discover", Registry)
    with pytest.raises(ConfigError, match="hotloop-gemma, which is not installed: `uv add"):
        new_family("gemma2", tmp_path / "plugin", kit=False)


def test_what_transformers_warns_of_at_small_sizes_is_not_shown(caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        before = logging.get_verbosity()
        guess("cwm")
        assert logging.get_verbosity() == before
    finally:
        logging.disable_propagation()
    assert not [record for record in caplog.records if record.name.startswith("transformers")]


def test_the_command_names_what_to_look_at(tmp_path):
    app = typer.Typer()
    app.command()(command)
    directory = tmp_path / "plugin"
    done = CliRunner().invoke(app, [FREE, "--output", str(directory), "--no-kit", "--json"])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row["directory"] == str(directory) and row["kit"] is None
    assert any("exports" in note for note in row["notes"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_kit_passes_on_a_right_draft_and_fails_on_a_wrong_one(tmp_path):
    right = new_family(FREE, tmp_path / "right")
    assert right.kit is not None and right.kit.ok and right.kit.passed > 30, right.kit.failures
    module = right.directory / "src" / f"hotloop_{FREE}" / "__init__.py"
    text = module.read_text()
    assert "mlp=Glu(" in text and "attention=Attention(" in text
    module.write_text(text.replace("attention=Attention(", "attention=Attention(interleaved=True,"))
    wrong = run_kit(right.directory, FREE)
    assert any("no_worse_than_eager" in name for name in wrong.failures)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_type_that_transformers_has_ends_in_a_description_or_a_reason():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    described = set()
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # models' own
            try:
                guess(model_type)
            except UnsupportedError as refusal:
                assert "model_type=" in str(refusal), refusal
            else:
                described.add(model_type)
    assert described >= {*SAID, "ernie4_5", FREE}
