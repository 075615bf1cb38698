"""What weights on the host refuse, by name, before anything moves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hotloop.homes import homes_of, settle
from hotloop.loading import load
from hotloop.wiring import receipt_of, wire
from hotloop_core import LayerPlan, Plan
from hotloop_core.errors import PlanError, UnsupportedError, UnwireError
from peft import LoraConfig, get_peft_model

PLAN = Plan(
    layers=(LayerPlan(streamed=True),) * 2,
    tokens=0,
    longest=0,
    embedding_on_host=True,
    head_on_host=True,
)


@pytest.fixture
def model(tiny_llama):
    return load(tiny_llama, bits=16, max_seq_len=64, wire=False, device="cpu")[0]


def test_undo_asks_for_the_wiring_to_be_undone_first_and_settling_comes_before_it(model):
    homes = settle(model, PLAN)
    wire(model)
    with pytest.raises(UnwireError, match="undo the later change first"):
        homes.undo()
    receipt_of(model).undo()
    homes.undo()
    wire(model)
    with pytest.raises(PlanError, match="settle its weights before"):
        settle(model, PLAN)


def test_a_second_settling_is_refused(model):
    settle(model, PLAN)
    with pytest.raises(PlanError, match="have their homes"):
        settle(model, PLAN)


def test_a_plan_for_another_model_is_refused(model):
    with pytest.raises(PlanError, match="for 1 layers, the model has 2"):
        settle(model, replace(PLAN, layers=PLAN.layers[:1]))


@pytest.mark.parametrize(
    "path", ["model.embed_tokens", "lm_head", "model.layers.1.self_attn.k_proj"]
)
def test_a_weight_that_trains_is_refused_by_its_path_before_anything_moves(model, path):
    model.get_submodule(path).weight.requires_grad_()
    with pytest.raises(PlanError, match=rf"{path}\.weight trains"):
        settle(model, PLAN)
    assert not any("_hotloop_home" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_a_module_that_peft_trains_in_full_is_refused(model, path):
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=[path.split(".")[-1]])
    )
    with pytest.raises(UnsupportedError, match=path):
        settle(adapted, PLAN)


def test_a_weight_that_begins_to_train_on_the_host_is_refused_when_it_is_used(model):
    settle(model, PLAN)
    model.requires_grad_()
    with pytest.raises(PlanError, match="trains"):
        model(torch.arange(10)[None])


def test_loading_over_a_streamed_weight_is_refused(model):
    settle(model, PLAN)
    with pytest.raises(UnsupportedError, match="by loading over it"):
        model.load_state_dict(model.state_dict())


def test_a_wired_model_with_weights_on_the_host_is_not_copied(model):
    settle(model, PLAN)
    wire(model)
    with pytest.raises(UnsupportedError, match="not copied or pickled"):
        copy.deepcopy(model)


def test_a_plan_that_puts_nothing_on_the_host_changes_nothing(model):
    classes = [type(m) for m in model.modules()]
    homes = settle(model, Plan(layers=(LayerPlan(),) * 2, tokens=0, longest=0))
    assert [type(m) for m in model.modules()] == classes
    assert homes_of(model) is None and str(homes) == "on the host: nothing"
    homes.fetch(0, 1)
    homes.start_head()
    homes.undo()


@pytest.mark.parametrize("embedding, head", [(True, False), (False, True)])
def test_one_of_two_tied_weights_alone_is_refused_and_nothing_has_moved(model, embedding, head):
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(PlanError, match="share one weight"):
        settle(model, replace(PLAN, embedding_on_host=embedding, head_on_host=head))
    assert homes_of(model) is None
    assert not any("_hotloop_home" in m.__dict__ for m in model.modules())
