from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from hotloop.verification import verify
from hotloop.verification.truth import exact_gradients
from hotloop.wiring import receipt_of, wire
from hotloop_core.errors import ConfigError, DataError, GradientError, WireError
from hotloop_core.plan import RECOMPUTE_ALL, Plan
from hotloop_engine.ops import _select
from hotloop_engine.ops.rms_norm import reference as rms_norm_reference
from hotloop_testkit.numerics import relative_error
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def with_lora(model, **changes):
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    model = get_peft_model(model, LoraConfig(**{**config, **changes}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def batch(rows=2, length=33):
    ids = torch.randint(0, 101, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids.clone()}


def packed():
    positions = torch.cat([torch.arange(n) for n in (5, 1, 27)])[None]
    return {**batch(1), "position_ids": positions}


def padded():
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, 25:], mask[1, :7] = 0, 0
    return {**batch(), "attention_mask": mask}


@pytest.fixture
def broken_norm(monkeypatch):
    """An rms_norm whose gradient is a thousandth too large: nothing that a loss curve would show."""
    monkeypatch.setitem(_select._registered, "rms_norm", {**_select._registered["rms_norm"]})

    class Broken:
        forward = staticmethod(rms_norm_reference.forward)

        @staticmethod
        def backward(dy_TD, *args, **kwargs):
            return rms_norm_reference.backward(dy_TD * 1.001, *args, **kwargs)

    _select.register("rms_norm", "broken", lambda: Broken, frozenset({"cpu"}))
    yield "broken"
    _select._find.cache_clear()


@pytest.mark.parametrize("make_batch", [batch, packed, padded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_wired_model_is_no_worse_than_eager(lora, dtype, make_batch):
    model = with_lora(tiny()) if lora else tiny()
    report = verify(model, make_batch(), dtype=dtype, slack=0.3)
    assert report.ok, str(report)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {row.name for row in report.rows} >= trained | {"loss", "all gradients"}
    assert sum(".*." in row.name for row in report.rows) == (14 if lora else 9)
    assert [r.ratio for r in report.rows] == sorted((r.ratio for r in report.rows), reverse=True)
    assert all(row.eager > 0 for row in report.rows if row.name != "loss")


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_truth_layer_by_layer_is_the_truth_of_the_whole_model_in_fp64(changes):
    model = (
        with_lora(tiny(**changes), modules_to_save=["lm_head"]) if not changes else tiny(**changes)
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    root = model.get_base_model() if not changes else model
    inputs = {**padded(), "use_cache": False}
    found = exact_gradients(root, "model.layers", inputs, trained, torch.float64)
    whole = copy.deepcopy(model).double()
    whole.config._attn_implementation = "sdpa"
    loss = whole(**inputs).loss
    loss.backward()
    expected = dict(whole.named_parameters())
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in found.by_name.items():
        # transformers' own norms, softmax and loss stay in fp32
        assert relative_error(gradient, expected[name].grad) < 2e-6, name


def test_four_bit_models_are_compared_with_their_dequantised_weights(tiny_llama):
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = LlamaForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=quantisation
    )
    report = verify(with_lora(model), batch(), slack=0.3)
    assert report.ok, str(report)
    assert (report.dtype, report.truth_dtype) == ("bfloat16", "float32")
    assert report.row("all gradients").ours < 0.05
    assert all(row.eager > 0 for row in report.rows if "lora" in row.name)


def test_fp16_gets_a_loss_scale():
    report = verify(with_lora(tiny()), batch(), dtype=torch.float16, slack=0.3)
    assert report.ok, str(report)
    assert any("scaled by" in note for note in report.notes)


@pytest.mark.parametrize("wired", [True, False], ids=["wired", "unwired"])
def test_the_model_is_left_as_it_was_found(wired):
    model = with_lora(tiny(), lora_dropout=0.25).eval()
    model.base_model.model.model.layers[0].train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    plan = Plan(layers=(RECOMPUTE_ALL,) * 2, tokens=66, longest=33)
    receipt = wire(model, plan, ops={"glu": "reference"}) if wired else None
    shared = dict(vars(receipt.shared)) if wired else None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before = {
        "classes": [type(m) for m in model.modules()],
        "state": [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in model.modules()],
        "keys": [sorted(vars(m)) for m in model.modules()],
        "grads": [p.grad for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "random": torch.get_rng_state(),
        "attention": model.config._attn_implementation,
    }
    report = verify(model, batch())
    assert "dropout was off" in report.notes
    assert [type(m) for m in model.modules()] == before["classes"]
    assert [sorted(vars(m)) for m in model.modules()] == before["keys"]
    states = [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in model.modules()]
    assert states == before["state"]
    assert all(p.grad is g for p, g in zip(model.parameters(), before["grads"], strict=True))
    assert all(g is None or bool((g == 1).all()) for g in before["grads"])
    assert all(map(torch.equal, model.parameters(), before["weights"]))
    assert torch.equal(torch.get_rng_state(), before["random"])
    assert model.config._attn_implementation == before["attention"]
    assert receipt_of(model) is receipt
    if wired:
        known = {"_known"}  # the sequences of the last batch
        assert {k: v for k, v in vars(receipt.shared).items() if k not in known} == {
            k: v for k, v in shared.items() if k not in known
        }
        receipt.undo()
        assert receipt_of(model) is None


def test_a_failure_on_the_way_leaves_the_model_as_it_was_found(monkeypatch):
    model = with_lora(tiny())
    receipt = wire(model)
    classes = [type(m) for m in model.modules()]
    monkeypatch.setattr(sys.modules["hotloop.verification"], "wired_run", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify(model, batch())
    monkeypatch.setattr(sys.modules["hotloop.verification"], "exact_gradients", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify(model, batch())
    assert receipt_of(model) is receipt and not receipt.undone
    assert [type(m) for m in model.modules()] == classes
    assert torch.isfinite(model(**batch()).loss)


def test_a_slightly_wrong_gradient_is_found_and_bisected(broken_norm):
    model = with_lora(tiny())
    wire(model, ops={"rms_norm": broken_norm})
    report = verify(model, batch(), bisect=True)
    assert not report.ok and report.exit_code == 1
    assert report.rows[0].ours > 1e-4 and report.row("loss").ok
    assert report.bisection.culprit == "rms_norm"
    assert {trial.op for trial in report.bisection.trials} >= {"glu", "rope", "attention"}
    assert "rms_norm moves the error" in str(report) and "worse than eager" in str(report)
    found = json.loads(report.to_json())
    assert found["ok"] is False and found["bisection"]["culprit"] == "rms_norm"
    assert len(found["rows"]) == len(report.rows)


def test_bisection_names_nothing_where_nothing_is_wrong():
    report = verify(with_lora(tiny()), batch(), bisect=True, slack=0.3)
    assert report.ok and report.exit_code == 0
    assert report.bisection.culprit is None and "no single op" in str(report)


def test_gradients_that_are_zero_in_truth_are_told():
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=TARGETS))
    report = verify(model, batch())
    assert any("14 of 28 gradients are zero" in note for note in report.notes)


def test_what_cannot_be_verified_is_refused_by_name():
    model = tiny()
    with pytest.raises(DataError, match="no labels"):
        verify(model, {"input_ids": batch()["input_ids"]})
    with pytest.raises(DataError, match="masked"):
        verify(model, {**batch(), "labels": torch.full((2, 33), -100)})
    with pytest.raises(ConfigError, match=r"float32, torch\.float16"):
        verify(model, batch(), dtype=torch.float64)
    with pytest.raises(WireError, match="adapter-kind"):
        verify(with_lora(tiny(), use_dora=True), batch())
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(GradientError, match=r"even in torch\.float64"):
        verify(model, batch())
    with pytest.raises(ConfigError, match="no parameter of the model trains"):
        verify(tiny().requires_grad_(False), batch())


def test_the_command_prints_json_and_fails_where_ours_is_worse(
    tiny_llama, capsys, monkeypatch, broken_norm
):
    from hotloop.cli import app
    from typer.testing import CliRunner

    command = ["verify", str(tiny_llama), "--bits", "16", "--tokens", "24", "--slack", "0.5"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"] and found["tokens"] == 24
    assert not any("prove nothing" in note for note in found["notes"])
    names = _select._registered["rms_norm"]
    monkeypatch.setitem(
        _select._registered,
        "rms_norm",
        {broken_norm: names[broken_norm], "reference": names["reference"]},
    )
    _select._find.cache_clear()
    result = CliRunner().invoke(app, [*command, "--bisect"])
    assert result.exit_code == 1, result.output
    assert "rms_norm moves the error" in result.stdout
