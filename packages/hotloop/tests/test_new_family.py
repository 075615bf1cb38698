"""`hotloop new-family`: what it reads out of transformers' models, what it refuses, what it writes."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import typer
from hotloop.cli.new_family import new_family as command
from hotloop.new_family import guess, new_family
from hotloop_core import discover
from hotloop_core.errors import ConfigError, OutputExistsError, UnsupportedError
from typer.testing import CliRunner

FREE = "seed_oss"
"""A type that no plugin of this project claims."""
READ = (
    "norm_eps",
    "activation",
    "query_scale",
    "attention_scale",
    "logit_softcap",
    "logit_divisor",
    "residual_scale",
    "window",
    "use_window",
    "window_start",
)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_a_guess_says_what_the_plugin_of_that_family_says(model_type):
    known = discover().match({"model_type": model_type})
    guessed = guess(model_type).family
    assert guessed.layer == known.layer
    assert {name: getattr(guessed.keys, name) for name in READ} == {
        name: getattr(known.keys, name) for name in READ
    }
    for name in ("decoder", "layers", "embedding", "final_norm", "head"):
        assert getattr(guessed, name) == getattr(known, name)


def test_interleaved_rotations_multipliers_and_switches_of_biases_are_found():
    ernie, granite, seed = (guess(name).family for name in ("ernie4_5", "granite", FREE))
    assert ernie.layer.attention.interleaved and ernie.layer.mlp.bias == "use_bias"
    assert granite.keys.attention_scale == "attention_multiplier"
    assert granite.keys.logit_divisor == "logits_scaling"
    assert granite.keys.residual_scale == "residual_multiplier"
    assert seed.layer.attention.o_bias == "attention_out_bias"
    assert seed.keys.refused.keys() == {"residual_dropout"}


@pytest.mark.parametrize(
    "model_type, reasons",
    [
        ("llamma", ["no model_type='llamma'", "Did you mean 'llama'"]),
        ("gemma3", ["made of several models", "text_config is 'gemma3_text'"]),
        ("bert_generation_x", ["no model_type='bert_generation_x'"]),
        ("t5", ["no ...ForCausalLM"]),
        ("mixtral", ["routes tokens to experts"]),
        ("cohere", ["parallel residual", "multiplied by 'logit_scale'"]),
        ("starcoder2", ["not gate, up and down, but mlp.c_fc (96, 64), mlp.c_proj (64, 96)"]),
    ],
)
def test_what_no_description_says_is_refused_with_every_reason(model_type, reasons, tmp_path):
    with pytest.raises(UnsupportedError) as refusal:
        new_family(model_type, tmp_path / "plugin", kit=False)
    assert [reason for reason in reasons if reason not in str(refusal.value)] == []
    assert not (tmp_path / "plugin").exists()


def test_a_guess_that_computes_something_else_says_so():
    (note,) = (n for n in guess("hunyuan_v1_dense").notes if "differ" in n)
    assert "not as guessed" in note


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
def test_the_kit_passes_on_a_right_guess_and_fails_on_a_wrong_one(tmp_path):
    right = new_family(FREE, tmp_path / "right")
    assert right.kit is not None and right.kit.ok and right.kit.passed > 30, right.kit.failures
    wrong = new_family("hunyuan_v1_dense", tmp_path / "wrong")
    assert wrong.kit is not None and not wrong.kit.ok
    assert any("no_worse_than_eager" in name for name in wrong.kit.failures)
