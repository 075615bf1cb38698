from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from hotloop.wiring import receipt_of, wire
from hotloop_core.errors import HotloopError, PlanError, UnwireError, WireError
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL, Plan
from hotloop_testkit.numerics import assert_no_worse_than
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def with_lora(model, **changes):
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**{**config, **changes}))


def batch(rows=2, length=17, vocab=101):
    ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def loss_and_gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{n: g.clone() for n, g in found.items()}}


def assert_same(a, b, tolerance=2e-5):
    assert a.keys() == b.keys()
    assert_no_worse_than(a, b, b, floor=tolerance)


def plan_for(model, layer):
    return Plan(layers=(layer,) * model.config.num_hidden_layers, tokens=34, longest=17)


@pytest.mark.parametrize("layer_plan", [KEEP_ALL, RECOMPUTE_ALL], ids=["keep", "recompute"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}]
)
def test_loss_and_every_gradient_are_those_of_eager(layer_plan, lora, changes):
    model = tiny(**changes)
    model = with_lora(model) if lora else model
    expected = loss_and_gradients(model, batch())
    wire(model, plan_for(model, layer_plan))
    assert_same(loss_and_gradients(model, batch()), expected)


def test_keep_and_recompute_give_the_same_bits():
    model = with_lora(tiny())
    receipt = wire(model, plan_for(model, KEEP_ALL))
    kept = loss_and_gradients(model, batch())
    receipt.replan(plan_for(model, RECOMPUTE_ALL))
    again = loss_and_gradients(model, batch())
    assert all(torch.equal(kept[n], again[n]) for n in kept)


def test_wire_then_lora_and_lora_then_wire_are_the_same():
    first, second = with_lora(tiny()), tiny()
    for model in (first, second):
        wire(model)
    second = with_lora(second)
    a, b = loss_and_gradients(first, batch()), loss_and_gradients(second, batch())
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_padded_rows_have_the_loss_of_eager():
    model = with_lora(tiny())
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 11:], mask[1, :4] = 0, 0
    labels = inputs["labels"].masked_fill(mask == 0, -100)
    labels[
        1, 4
    ] = -100  # eager lets the padding before it predict it; here padding predicts nothing
    inputs = {**inputs, "attention_mask": mask, "labels": labels}
    expected = loss_and_gradients(model, inputs)
    wire(model)
    assert_same(loss_and_gradients(model, inputs), expected)


def test_packed_rows_do_not_see_each_other():
    model = with_lora(tiny())
    wire(model)
    lengths, ids = [5, 1, 11], batch(1, 17)["input_ids"]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids=ids, labels=ids, position_ids=positions).loss * (17 - 3)
    rows = [part[None] for part in ids[0].split(lengths) if len(part) > 1]
    apart = sum(model(input_ids=r, labels=r).loss * (r.shape[1] - 1) for r in rows)
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)


def test_undo_restores_classes_and_bits():
    model = tiny()
    inputs = batch()
    before, classes = loss_and_gradients(model, inputs), [type(m) for m in model.modules()]
    keys, name = list(model.state_dict()), model.config._attn_implementation
    receipt = wire(model)
    assert list(model.state_dict()) == keys
    receipt.undo()
    after = loss_and_gradients(model, inputs)
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == name and receipt_of(model) is None
    assert all(torch.equal(before[n], after[n]) for n in before)
    with pytest.raises(UnwireError, match="undone before"):
        receipt.undo()


def test_undo_refuses_and_touches_nothing_when_a_class_changed_later():
    model = tiny()
    receipt = wire(model)
    layer = model.model.layers[1]
    later = type("Later", (type(layer),), {})
    layer.__class__ = later
    with pytest.raises(UnwireError, match=r"model\.layers\.1"):
        receipt.undo()
    assert receipt_of(model) is receipt


def test_a_captured_method_delegates_once_undone():
    model = tiny()
    expected = model(**batch()).loss
    receipt = wire(model)
    captured = model.forward
    receipt.undo()
    assert torch.equal(captured(**batch()).loss, expected)


def test_two_models_are_wired_differently():
    first, second, third = tiny(), tiny(), tiny()
    wire(first, plan_for(first, RECOMPUTE_ALL))
    wire(second, attention="reference")
    assert receipt_of(third) is None
    a, b, c = (loss_and_gradients(m, batch()) for m in (first, second, third))
    assert_same(a, c)
    assert_same(b, c)


def test_names_signature_and_config_survive(tmp_path):
    model = tiny()
    names = [type(m).__name__ for m in model.modules()]
    signature = inspect.signature(model.forward)
    wire(model)
    assert [type(m).__name__ for m in model.modules()] == names
    assert inspect.signature(model.forward) == signature
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "hotloop" not in text and "LlamaForCausalLM" in text
    assert torch.equal(
        LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight
    )


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_wired_on_their_own(clone):
    model = with_lora(tiny())
    wire(model)
    expected = loss_and_gradients(model, batch())
    twin = clone(model)
    assert_same(loss_and_gradients(twin, batch()), expected, 1e-6)
    receipt_of(twin).undo()
    assert receipt_of(model) is not None and receipt_of(twin) is None


def test_generation_gives_the_same_text():
    model = with_lora(tiny()).eval()
    ids = batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)
    wire(model)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options), expected)


def test_logits_beside_a_loss_are_there_when_read():
    model = tiny().eval()
    with torch.no_grad():
        expected = model(**batch())
        wire(model)
        found = model(**batch())
        assert tuple(found.logits.shape) == tuple(expected.logits.shape)
        torch.testing.assert_close(found.logits.argmax(-1), expected.logits.argmax(-1))
        torch.testing.assert_close(found.logits + 0, expected.logits, rtol=1e-4, atol=1e-5)


def test_adapters_switched_disabled_and_merged_are_seen():
    model = with_lora(tiny())
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    inputs = batch()

    def losses(m):
        found = []
        with torch.no_grad():
            for name in ("default", "other"):
                m.set_adapter(name)
                found.append(m(**inputs).loss)
            with m.disable_adapter():
                found.append(m(**inputs).loss)
            m.merge_adapter()
            found.append(m(**inputs).loss)
            m.unmerge_adapter()
            found.append(m(**inputs).loss)
        return torch.stack(found)

    expected = losses(model)
    wire(model)
    torch.testing.assert_close(losses(model), expected, rtol=1e-5, atol=1e-5)


def test_a_second_backward_is_an_error_that_says_so():
    model = with_lora(tiny())
    wire(model)
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(HotloopError, match="second"):
        loss.backward()
    hidden = model.base_model.model.model(input_ids=batch()["input_ids"]).last_hidden_state
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(PlanError, match="a second time"):
        hidden.sum().backward()


@pytest.mark.parametrize(
    "enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"]
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_transformers_checkpointing_does_not_run_layers_twice(enable, monkeypatch):
    from hotloop_engine.blocks import MlpBlock

    model = with_lora(tiny())
    if not hasattr(model, enable):
        pytest.skip("this transformers has no such method")
    expected = loss_and_gradients(model, batch())
    wire(model)
    getattr(model, enable)()
    model.train()
    calls = []
    original = MlpBlock.forward
    monkeypatch.setattr(MlpBlock, "forward", lambda *a: (calls.append(1), original(*a))[1])
    assert_same(loss_and_gradients(model, batch()), expected)
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize(
    "change, exception",
    [
        (lambda m: m.model.layers[1].mlp.register_forward_hook(lambda *a: None), "hooks"),
        (
            lambda m: m.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *a: None),
            "hooks",
        ),
    ],
)
def test_foreign_hooks_are_refused_by_name_or_run_in_the_models_own_code(change, exception):
    model = tiny()
    change(model)
    expected = model(**batch()).loss
    with pytest.raises(WireError, match=f"model.layers.*{exception}"):
        wire(model)
    receipt = wire(model, allow_eager={exception})
    assert len(receipt.left_alone) == 1
    torch.testing.assert_close(model(**batch()).loss, expected)


def test_a_hook_that_comes_after_wiring_is_refused_at_the_call():
    model = tiny()
    wire(model)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *a: None)
    with pytest.raises(WireError, match="hook"):
        model(**batch())


def test_dora_and_two_active_adapters_are_refused_by_name():
    model = with_lora(tiny(), use_dora=True)
    with pytest.raises(WireError, match="adapter-kind"):
        wire(model)
    model = with_lora(tiny())
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(WireError, match="adapters"):
        wire(model)


def test_a_4d_mask_is_refused():
    model = tiny()
    wire(model)
    mask = torch.zeros(2, 1, 17, 17)
    with pytest.raises(WireError, match="mask"):
        model(**batch(), attention_mask=mask)


def test_wiring_twice_and_unknown_exceptions_are_errors():
    wire(model := tiny())
    with pytest.raises(WireError, match="undo it first"):
        wire(model)
    with pytest.raises(WireError, match="no exception is called nonsense"):
        wire(tiny(), allow_eager={"nonsense"})


def test_hidden_states_and_attentions_are_those_of_the_model():
    model = tiny(attn_implementation="eager").eval()
    inputs = {"input_ids": batch()["input_ids"]}
    expected = model(**inputs, output_hidden_states=True, output_attentions=True)
    wire(model)
    found = model(**inputs, output_hidden_states=True, output_attentions=True)
    ours, theirs = (out.hidden_states + out.attentions for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_same(loss_and_gradients(model.train(), batch()), loss_and_gradients(tiny(), batch()))


def test_autocast_keeps_the_residual_stream_of_an_fp32_model():
    model = with_lora(tiny())
    exact = loss_and_gradients(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        eager = loss_and_gradients(model, batch())
    wire(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(model, batch())
    assert_no_worse_than(ours, eager, exact, slack=0.1, floor=8e-3)


def test_modules_to_save_and_lora_on_the_head_train():
    for changes in (
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": [*TARGETS, "lm_head", "embed_tokens"]},
    ):
        model = with_lora(tiny(), **changes)
        expected = loss_and_gradients(model, batch())
        wire(model)
        assert_same(loss_and_gradients(model, batch()), expected)


def test_num_items_in_batch_divides_the_sum():
    model = tiny()
    inputs = {**batch(), "num_items_in_batch": torch.tensor(50.0)}
    expected = model(**inputs).loss
    wire(model)
    found = model(**inputs).loss
    torch.testing.assert_close(found, expected)
    found *= 2  # as Trainer does
    found.backward()


def test_nothing_is_saved_without_gradients(monkeypatch):
    from hotloop_engine.blocks import run

    model = with_lora(tiny())
    wire(model)
    monkeypatch.setattr(run, "Run", lambda *a: pytest.fail("a graph was built"))
    with torch.no_grad():
        assert torch.isfinite(model(**batch()).loss)


def test_a_larger_batch_is_planned_again_within_the_same_budget():
    from hotloop.planner import plan
    from hotloop_core.errors import BudgetError

    model = with_lora(tiny())
    small = plan(model, tokens=17, vram="1GiB")
    receipt = wire(model, small)
    model(**batch(1)).loss.backward()
    assert receipt.plan is small
    model(**batch(3)).loss.backward()
    assert receipt.plan.tokens == 51
    tight = plan(model, tokens=17, vram=small.peak_bytes, placements="keep")
    receipt.replan(tight)
    with pytest.raises(BudgetError):
        model(**batch(8, 120))
    assert receipt.plan is tight
    with torch.no_grad():
        model(**batch(8, 120))
