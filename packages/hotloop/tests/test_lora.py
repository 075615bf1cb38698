import copy

import pytest
import torch
from hotloop.loading import load
from hotloop.lora import add_lora
from hotloop.planner import plan
from hotloop.wiring import receipt_of, wire
from hotloop_core.errors import BudgetError, ConfigError, PlanError
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL, LayerPlan, Placement, Plan

KEEP, OFFLOAD = Placement.KEEP, Placement.OFFLOAD

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return load(tiny_llama, bits=16, max_seq_len=64, wire=False, device="cpu", dtype="bfloat16")[0]


@pytest.fixture
def base(loaded):
    return copy.deepcopy(loaded)


def adapters(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def test_the_default_adapts_the_seven_projections_of_every_layer_and_nothing_else(base):
    model = add_lora(base, r=4)
    assert model.peft_config["default"].target_modules == SEVEN
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == adapters(model).keys()
    assert len(trained) == 2 * 7 * 2
    assert all(p.dtype == torch.float32 for p in adapters(model).values())
    assert all(not p.any() for name, p in adapters(model).items() if "lora_B" in name)


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_random_state(base):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = adapters(add_lora(copy.deepcopy(base), seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = adapters(add_lora(copy.deepcopy(base), seed=1))
    other = adapters(add_lora(base, seed=2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "targets, names",
    [
        (["q", "v"], {"q_proj", "v_proj"}),
        (["gate_proj", "down"], {"gate_proj", "down_proj"}),
        (r".*\.layers\.1\.mlp\.up_proj", {"up_proj"}),
    ],
)
def test_targets_are_roles_names_or_an_expression(base, targets, names):
    found = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name in adapters(add_lora(base, targets=targets))
    }
    assert found == names


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"targets": ["q_porj"]}, "Did you mean 'q_proj'"),
        ({"targets": r"nothing.*"}, "matches no module"),
        ({"targets": []}, r"targets=\[\]; name at least one module"),
        ({"targets": None}, "targets=None; name at least one module"),
        ({"r": 0}, "r >= 1"),
        ({"dropout": 1.0}, "dropout < 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(base, arguments, says):
    with pytest.raises(ConfigError, match=says):
        add_lora(base, **arguments)


@pytest.mark.parametrize(
    "names, says",
    [(["lm_haed"], "no module is named 'lm_haed'.*'lm_head'"), ("lm_head", "a list of names")],
)
def test_what_is_to_train_in_full_and_is_nowhere_is_refused(base, names, says):
    with pytest.raises(ConfigError, match=says):
        add_lora(base, modules_to_save=names)


def test_a_second_adapter_is_refused(base):
    model = add_lora(base)
    with pytest.raises(ConfigError, match="has the adapters default already"):
        add_lora(model)


def test_options_reach_peft(base):
    model = add_lora(
        base, r=8, alpha=32, dropout=0.1, rslora=True, modules_to_save=["embed_tokens"]
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.1)
    assert config.use_rslora
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("embed_tokens.modules_to_save" in name for name in trained)


def test_a_wired_model_is_planned_again_for_its_adapters(tiny_llama):
    model, _ = load(tiny_llama, bits=16, max_seq_len=64, vram="1GiB", device="cpu")
    before = receipt_of(model).plan
    adapted = add_lora(model, r=64, placements="recompute")
    after = receipt_of(adapted).plan
    # Loaded with room for adapters of rank 16.
    room, taken = (plan.memory["adapters, gradients, optimizer"] for plan in (before, after))
    assert taken == 4 * room > 0
    assert (after.tokens, after.budget) == (before.tokens, before.budget)
    assert after.layers == (RECOMPUTE_ALL,) * 2
    loss = adapted(input_ids=torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss
    loss.backward()
    assert all(p.grad is not None for p in adapters(adapted).values())


def test_adapters_that_do_not_fit_are_refused_and_the_model_is_as_it_was(tiny_llama):
    model, _ = load(tiny_llama, bits=16, max_seq_len=64, device="cpu", vram="386MiB")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(BudgetError, match="at least"):
        add_lora(model, r=512)
    assert [name for name, _ in model.named_parameters()] == names


def planned_and_adapted(model, **options):
    """The plan of a model that was planned with these options and then got adapters."""
    wire(model, plan(model, tokens=64, **options))
    return receipt_of(add_lora(model, r=4)).plan


@pytest.mark.parametrize("vram", [None, "1GiB"])
def test_adapters_keep_what_was_chosen_for_the_plan_before(base, vram):
    lossy = planned_and_adapted(copy.deepcopy(base), nf4_kv=True, vram=vram)
    assert all(layer.nf4_kv for layer in lossy.layers)
    chosen = planned_and_adapted(copy.deepcopy(base), placements="offload", vram=vram)
    assert chosen.fixed
    assert [layer.placement("x") for layer in chosen.layers] == [OFFLOAD, KEEP]
    both = {"placements": {"gate_up": "recompute"}, "nf4_kv": True, "vram": vram}
    made = planned_and_adapted(base, **both)
    assert {layer.placement("gate_up") for layer in made.layers} == {Placement.RECOMPUTE}
    assert all(layer.nf4_kv for layer in made.layers)
    assert made.memory["adapters, gradients, optimizer"] > 0


def test_new_placements_take_the_place_of_those_before(base):
    wire(base, plan(base, tokens=64, placements="offload", vram="1GiB"))
    made = receipt_of(add_lora(base, r=4, placements="keep")).plan
    assert made.fixed
    assert made.layers == (KEEP_ALL,) * 2


def test_chosen_placements_that_do_not_fit_with_adapters_move_no_weights(base):
    least = plan(base, tokens=64, placements="keep").peak_bytes
    wire(base, plan(base, tokens=64, placements="keep", vram=least + 2**20))
    with pytest.raises(BudgetError, match="with these placements"):
        add_lora(base, r=512)
    assert not adapters(base)
    assert not receipt_of(base).plan.has_weights_on_host


def test_adapters_change_no_plan_that_was_made_by_hand(base):
    layers = (LayerPlan(placements={"gate_up": OFFLOAD}), RECOMPUTE_ALL)
    wire(base, Plan(layers=layers, tokens=64, longest=32))
    assert receipt_of(add_lora(base, r=4)).plan == Plan(layers=layers, tokens=64, longest=32)


def test_a_model_that_was_wired_without_a_plan_gets_adapters(base):
    wire(base)
    with pytest.raises(PlanError, match="expected one that knows its batch"):
        add_lora(base, placements="recompute")
    assert receipt_of(add_lora(base)).plan.layers == (KEEP_ALL,) * 2
