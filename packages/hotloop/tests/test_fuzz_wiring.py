"""What nobody planned for: models changed by hand, calls that few make, combinations drawn at random."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import transformers
from hotloop.wiring import receipt_of, wire
from hotloop_core.errors import (
    GradientError,
    PlanError,
    UnsupportedError,
    WireError,
)
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL, LayerPlan, Placement, Plan
from hotloop_testkit.numerics import assert_no_worse_than
from peft import AdaLoraConfig, LNTuningConfig, LoraConfig, get_peft_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAVED = ("x", "qkv", "attention", "attention_out", "x_mid", "gate_up", "mlp_out")
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WIDE = {**SIZES, "head_dim": 16}


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 2, **changes})
    return transformers.LlamaForCausalLM(config)


def with_lora(model, **changes):
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **changes}
    return get_peft_model(model, LoraConfig(**options))


def batch(rows=2, length=13):
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_same(ours, theirs, tolerance=5e-5):
    assert_no_worse_than(ours, theirs, theirs, floor=tolerance)


def plan_of(layer, layers=2):
    return Plan(layers=(layer,) * layers, tokens=0, longest=0)


def everywhere(placement):
    return plan_of(LayerPlan(placements=dict.fromkeys(SAVED, placement)))


def draw(seed):
    """A model with adapters, a batch and a plan."""
    pick = random.Random(seed)
    configs = [
        transformers.LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
        transformers.Qwen2Config(**SIZES),
        transformers.Qwen3Config(**WIDE),
        transformers.Gemma2Config(**WIDE, sliding_window=5, attn_implementation="eager"),
        transformers.Gemma3TextConfig(**WIDE, sliding_window=5),
        transformers.Phi3Config(**SIZES, resid_pdrop=0.0),
        transformers.Olmo2Config(**SIZES),
        transformers.Glm4Config(**WIDE, partial_rotary_factor=0.5),
        transformers.StableLmConfig(**SIZES, partial_rotary_factor=0.5, use_qkv_bias=True),
    ]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configs[seed % len(configs)])
    linears = [
        n.rpartition(".")[2]
        for n, m in model.model.layers[0].named_modules()
        if hasattr(m, "in_features")
    ]
    targets = pick.sample(linears, pick.randint(1, len(linears)))
    model = with_lora(
        model,
        target_modules=targets + pick.choice([[], ["lm_head"]]),
        rank_pattern={targets[0]: 7},
        alpha_pattern={targets[-1]: 3},
        use_rslora=pick.random() < 0.5,
        bias=pick.choice(["none", "all", "lora_only"]),
    )
    inputs = batch(*pick.choice([(1, 1), (1, 9), (3, 13)]))
    inputs = {
        **inputs,
        "use_cache": False,
        "num_items_in_batch": pick.choice([37, torch.tensor(37.0)]),
    }
    if inputs["input_ids"].shape[1] > 1:
        ids = inputs["input_ids"]
        kind = pick.choice(["dense", "right", "packed"])
        if kind == "right":
            inputs["attention_mask"] = torch.ones_like(ids)
            inputs["attention_mask"][-1, 6:] = 0
            inputs["labels"] = ids.masked_fill(inputs["attention_mask"] == 0, -100)
        elif kind == "packed":
            length = ids.shape[1]
            row = torch.cat([torch.arange(4), torch.arange(length - 4)])
            inputs["position_ids"] = row.expand(len(ids), -1)
            inputs["labels"] = ids.clone()
            inputs["labels"][:, 4] = -100
    layers = tuple(
        LayerPlan(placements={name: pick.choice(list(Placement)) for name in SAVED})
        for _ in range(SIZES["num_hidden_layers"])
    )
    return model, inputs, Plan(layers=layers, tokens=0, longest=0, tile=pick.choice([None, 8]))


@pytest.mark.parametrize("seed", range(9))
def test_any_combination_has_the_loss_and_gradients_of_the_model_alone(seed):
    model, inputs, plan = draw(seed)
    truth = loss_and_gradients(copy.deepcopy(model).double(), inputs)
    expected = loss_and_gradients(model, inputs)
    receipt = wire(model, plan)
    found = loss_and_gradients(model, inputs)
    largest = max(float(t.norm()) for t in truth.values())
    real = [n for n, t in truth.items() if float(t.norm()) > 1e-6 * largest]
    assert found.keys() == expected.keys()
    assert_no_worse_than(
        *({n: m[n] for n in real} for m in (found, expected, truth)), slack=1, floor=5e-5
    )
    again = loss_and_gradients(model, inputs)
    assert all(torch.equal(found[n], again[n]) for n in found)
    receipt.undo()
    after = loss_and_gradients(model, inputs)
    assert all(torch.equal(expected[n], after[n]) for n in expected)


def test_a_parameter_that_serves_twice_in_a_layer_gets_one_sum():
    model = llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
        layer.input_layernorm.weight = layer.post_attention_layernorm.weight
    expected = loss_and_gradients(model, batch())
    wire(model)
    assert_same(loss_and_gradients(model, batch()), expected)


@pytest.mark.parametrize("placement", list(Placement))
def test_a_hidden_state_changed_in_place_between_layers_is_seen_by_backward(placement):
    model = with_lora(llama())
    for layer in model.base_model.model.model.layers:
        layer.register_forward_hook(lambda module, args, out: (out.mul_(1.5), None)[1])
    expected = loss_and_gradients(model, batch())
    wire(model, everywhere(placement))
    assert_same(loss_and_gradients(model, batch()), expected)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_dtype_that_changes_under_autocast_is_seen(lora):
    model = (with_lora(llama()) if lora else llama()).to(torch.bfloat16)
    wire(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss_and_gradients(model, batch())
        found = loss_and_gradients(model.float(), batch())
        receipt_of(model).undo()
        assert_same(found, loss_and_gradients(model, batch()), 6e-2)


def test_autocast_leaves_fp64_alone():
    model = with_lora(llama()).double()
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(model, batch())
        wire(model)
        assert_same(loss_and_gradients(model, batch()), expected, 1e-5)
        assert model(**batch()).logits.dtype == torch.float64


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32])
def test_an_adapter_on_the_head_takes_any_autocast(weights):
    model = with_lora(llama(), target_modules=["lm_head", "q_proj"]).to(weights)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            expected = loss_and_gradients(model, batch())
            receipt = wire(model)
            assert_same(loss_and_gradients(model, batch()), expected, 5e-2)
            receipt.undo()


def test_layers_that_share_a_state_use_their_own_adapters():
    """As DataParallel's replicas do."""
    model = with_lora(llama())
    wire(model)
    loss_and_gradients(model, batch())
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            replica._parameters[name] = None
            if parameter is not None:
                del replica._parameters[name]
                setattr(replica, name, parameter * 1.3)
    found = replicas[model](**batch()).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    receipt_of(model).undo()
    torch.testing.assert_close(found, model(**batch()).loss)


def test_adapters_on_norms_and_of_other_ranks_are_refused_by_name():
    norms = LNTuningConfig(task_type="CAUSAL_LM", target_modules=["post_attention_layernorm"])
    ranks = AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=TARGETS)
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        adapted = get_peft_model(llama(), norms)
    for model in (adapted, get_peft_model(llama(), ranks)):
        with pytest.raises(WireError, match="adapter-kind"):
            wire(model)


@pytest.mark.parametrize("wire_first", [True, False])
def test_norms_that_peft_trains_are_wired_and_given_back(wire_first):
    model = llama()
    if wire_first:
        wire(model)
    model = with_lora(model, modules_to_save=["norm", "input_layernorm"])
    if not wire_first:
        wire(model)
    found = loss_and_gradients(model, batch())
    receipt_of(model).undo()
    assert not [n for n, m in model.named_modules() if "_hotloop" in m.__dict__]
    assert_same(found, loss_and_gradients(model, batch()))


@pytest.mark.parametrize("wire_first", [True, False])
def test_a_block_that_peft_trains_whole_is_refused_or_runs_and_is_disabled_as_in_peft(wire_first):
    def made(allow_eager=(), saved=("mlp",)):
        model = llama()
        if wire_first:
            wire(model, allow_eager=allow_eager)
        model = with_lora(model, target_modules=["q_proj"], modules_to_save=list(saved))
        if not wire_first:
            wire(model, allow_eager=allow_eager)
        return model

    with pytest.raises(WireError, match="around the whole of mlp"):
        made()(**batch())
    model = made({"adapter-kind"})
    for part in (model, made(saved=("gate_proj", "up_proj", "down_proj"))):
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1.5)
        found = loss_and_gradients(part, batch())
        with part.disable_adapter():
            base = part(**batch()).loss
        receipt_of(part).undo()
        assert_same(found, loss_and_gradients(part, batch()))
        with part.disable_adapter():
            torch.testing.assert_close(base, part(**batch()).loss)


def test_a_pickle_brings_its_attention_name_to_a_process_that_lacks_it(monkeypatch):
    model = llama()
    wire(model)
    saved, expected = pickle.dumps(model), model(**batch()).loss
    name = model.config._attn_implementation
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, name)
    torch.testing.assert_close(pickle.loads(saved)(**batch()).loss, expected)


def test_the_configs_choice_of_outputs_is_kept():
    model = llama(attn_implementation="eager").eval()
    model.config.output_attentions = True
    expected = model(**batch(), return_dict=False)
    wire(model)
    model.config.return_dict = False
    found = model(**batch())
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-4, atol=1e-5)


def test_a_cache_that_training_asks_for_is_filled():
    model, ids = with_lora(llama()), batch()["input_ids"]

    def through_the_cache():
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        return loss_and_gradients(
            model, {"input_ids": ids[:, 6:], "labels": ids[:, 6:], "past_key_values": cache}
        )

    expected = through_the_cache()
    wire(model)
    assert_same(through_the_cache(), expected)


def test_epsilon_is_the_modules_and_a_scale_unlike_the_configs_is_refused():
    model = llama()
    for norm in (model.model.layers[0].input_layernorm, model.model.norm):
        norm.variance_epsilon = 1e-2
    expected = loss_and_gradients(model, batch())
    receipt = wire(model)
    assert_same(loss_and_gradients(model, batch()), expected)
    receipt.undo()
    model.model.layers[1].self_attn.scaling = 0.05
    with pytest.raises(WireError, match=r"layers\.1: its attention scales by 0\.05"):
        wire(model)


def test_what_wiring_is_given_is_checked_before_anything_changes():
    model = llama()
    with pytest.raises(PlanError, match="3 layers, the model has 2"):
        wire(model, plan_of(KEEP_ALL, 3))
    with pytest.raises(PlanError, match="places gateup"):
        wire(model, plan_of(LayerPlan(placements={"gateup": Placement.RECOMPUTE})))
    with pytest.raises(PlanError, match="places gateup"):
        wire(llama()).replan(plan_of(LayerPlan(placements={"gateup": Placement.RECOMPUTE})))
    with pytest.raises(WireError, match="no op is called rms_norms"):
        wire(model, ops={"rms_norms": "triton"})
    del model.model.norm
    with pytest.raises(WireError, match=r"last norm at 'model\.norm'"):
        wire(model)
    assert receipt_of(model) is None
    assert not [m for m in model.modules() if "_hotloop" in m.__dict__]


def test_keys_and_values_that_do_not_fill_blocks_are_refused_in_nf4():
    model = llama()
    wire(model, plan_of(LayerPlan(nf4_kv=True)))
    with pytest.raises(UnsupportedError, match="48 columns"):
        model(**batch())


def test_a_compiled_models_wrapper_is_looked_through():
    model = llama()
    compiled = torch.compile(model, backend="eager")
    receipt = wire(compiled)
    assert receipt_of(compiled) is receipt_of(model) is receipt and receipt.model is model


def test_second_derivatives_and_transforms_are_refused_by_name():
    model = llama()
    wire(model)
    hidden = model.model(input_ids=batch()["input_ids"]).last_hidden_state
    with pytest.raises(GradientError, match=r"layers\.1: a wired layer has no second derivative"):
        torch.autograd.grad(hidden.sum(), model.model.embed_tokens.weight, create_graph=True)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(given):
        return torch.func.functional_call(model, given, (), batch()).loss

    torch.testing.assert_close(loss(parameters), model(**batch()).loss)
    with pytest.raises(UnsupportedError, match=r"layers\.0: a torch\.func transform"):
        torch.func.grad(loss)(parameters)


def test_a_frozen_weight_changed_between_the_passes_is_an_error():
    model = with_lora(llama())
    wire(model, plan_of(RECOMPUTE_ALL))
    loss = model(**batch()).loss
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_empty_batch_and_a_model_without_a_head_run():
    model = llama()
    wire(model)
    assert model(input_ids=torch.zeros(0, 5, dtype=torch.long)).logits.shape == (0, 5, 97)
    config = transformers.LlamaConfig(**SIZES)
    classifier = transformers.LlamaForSequenceClassification(config)
    inputs = {"input_ids": batch()["input_ids"], "labels": torch.tensor([0, 1])}
    expected = loss_and_gradients(classifier, inputs)
    wire(classifier)
    assert_same(loss_and_gradients(classifier, inputs), expected)
