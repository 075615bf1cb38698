"""bitsandbytes' 8-bit AdamW over a wired model: the same training, its state and its settings as ever."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
from hotloop import wiring
from hotloop.wiring import receipt_of
from hotloop_core.kernels import AdamWOptions
from hotloop_engine.ops.adamw_8bit import reference
from peft import LoraConfig, get_peft_model
from torch.optim import optimizer as torch_optimizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def wire(model):
    """On a CPU steps are taken only by an implementation that was named."""
    return wiring.wire(model, ops={"adamw_8bit": "reference"})


IDS = torch.arange(3, 33).view(2, 15)


def tiny(r=8):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=r, target_modules="all-linear"))
    return model.train()


def eight_bit(model, cls=bnb.optim.AdamW8bit, **options):
    """Small enough that some adapters have 8-bit state (1,024 elements) and some 32-bit (512)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return cls(trained, lr=1e-2, min_8bit_size=600, **options)


def train(model, optimizer, steps=4):
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def updates():
    """The calls of the op: (number of tensors, options)."""
    seen: list[tuple[int, AdamWOptions]] = []
    real = reference.update_

    def update_(tensors, m_table, v_table, options):
        seen.append((len(tensors), options))
        real(tensors, m_table, v_table, options)

    with mock.patch.object(reference, "update_", update_):
        yield seen


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Not every element: a moment halfway between two codes may take the other.
        assert (found[name] - value).norm() <= 5e-3 * value.norm(), name


def trained_by_bitsandbytes(**options):
    class Plain(bnb.optim.AdamW8bit):
        """A subclass is passed by."""

    model = tiny()
    wire(model)
    optimizer = eight_bit(model, Plain, **options)
    train(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("cls", [bnb.optim.AdamW8bit, bnb.optim.Adam8bit])
def test_training_is_as_with_bitsandbytes_own_step(cls, updates):
    model = tiny()
    wire(model)
    optimizer = eight_bit(model, cls, weight_decay=0.01)
    train(model, optimizer)
    assert [options.step for _, options in updates] == [2, 3, 4]  # bitsandbytes makes the state
    known, theirs = trained_by_bitsandbytes(weight_decay=0.01)
    assert len(updates) == 3
    assert_close(adapters(model), adapters(known))
    sizes = [p.numel() for p in optimizer.param_groups[0]["params"]]
    assert updates[0][0] == sum(n >= 600 for n in sizes) < len(sizes)
    steps = {state["step"] for state in optimizer.state.values()}
    assert steps == {4}
    one, other = optimizer.state_dict(), theirs.state_dict()
    assert one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert state.keys() == other["state"][index].keys()


def test_it_goes_on_from_bitsandbytes_state_and_bitsandbytes_from_ours(updates):
    model = tiny()
    receipt = wire(model)
    optimizer = eight_bit(model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict()), adapters(model)
    train(model, optimizer, 2)
    resumed = tiny()
    resumed.load_state_dict(saved[1], strict=False)
    wire(resumed)
    again = eight_bit(resumed)
    again.load_state_dict(saved[0])
    train(resumed, again, 2)
    for name, value in adapters(model).items():
        assert torch.equal(adapters(resumed)[name], value), name
    count = len(updates)
    receipt.undo()
    train(model, optimizer, 1)
    assert len(updates) == count, "undone"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_wired_model_is_one_too(copied, updates):
    model = tiny()
    wire(model)
    other = copied(model)
    train(other, eight_bit(other), 2)
    assert len(updates) == 1
    receipt_of(other).undo()
    train(other, eight_bit(other), 2)
    assert len(updates) == 1


def test_a_scheduler_clipping_and_groups_with_settings_of_their_own(updates):
    model = tiny()
    wire(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "lora_A" in n], "lr": 1e-2},
        {"params": [p for n, p in named if "lora_B" in n], "lr": 3e-2, "betas": (0.8, 0.99)},
    ]
    optimizer = bnb.optim.AdamW8bit(groups, min_8bit_size=600)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=4)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        assert all(p.grad is not None for _, p in named), "gradients stay until they are cleared"
        schedule.step()
        optimizer.zero_grad()
    found = [(round(options.lr, 6), options.beta1, options.step) for _, options in updates]
    assert sorted(found) == [
        (0.0075, 0.9, 3),
        (0.00875, 0.9, 2),
        (0.0225, 0.8, 3),
        (0.02625, 0.8, 2),
    ]


def test_what_it_does_not_take_is_left_to_bitsandbytes(updates):
    wired, other = tiny(), tiny()
    wire(wired)
    train(other, eight_bit(other), 2)
    assert not updates, "an optimizer of a model that is not wired"
    paged = eight_bit(wired)
    train(wired, paged, 1)
    paged.is_paged = True
    train(wired, paged, 1)
    assert not updates, "paged"
    torch_own = torch.optim.AdamW([p for p in wired.parameters() if p.requires_grad], lr=1e-3)
    train(wired, torch_own, 2)
    assert not updates, "torch's own"
    unnamed = tiny()
    wiring.wire(unnamed)
    train(unnamed, eight_bit(unnamed), 2)
    assert not updates, "on a CPU, where bitsandbytes is faster"


def test_both_models_of_one_optimizer_train_and_only_the_wired_ones_tensors_are_taken(updates):
    wired, other = tiny(), tiny()
    wire(wired)
    both = [p for model in (wired, other) for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(both, lr=1e-2, min_8bit_size=600)
    before = adapters(other)
    for _ in range(2):
        for model in (wired, other):
            model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    big = [p for p in wired.parameters() if p.requires_grad and p.numel() >= 600]
    assert updates[0][0] == len(big)
    assert_close(adapters(wired), adapters(other))
    assert any(not torch.equal(before[n], p) for n, p in adapters(other).items())


def test_parameters_that_take_the_place_of_others_are_seen(updates):
    wired, other = tiny(), tiny()
    wire(wired)
    optimizer = eight_bit(other)
    train(other, optimizer)
    assert not updates
    optimizer.param_groups[0]["params"] = [p for p in wired.parameters() if p.requires_grad]
    train(wired, optimizer, 2)
    assert [options.step for _, options in updates] == [2]


def test_an_override_of_bitsandbytes_manager_is_heard(updates):
    model = tiny()
    wire(model)
    chosen = next(p for p in model.parameters() if p.requires_grad and p.numel() >= 600)
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.override_config(chosen, "lr", 0.5)
    try:
        optimizer = eight_bit(model)
        train(model, optimizer, 2)
    finally:
        del manager.pid2config[id(chosen)]
    assert sorted(options.lr for _, options in updates) == [0.01, 0.5]


def test_a_step_with_a_closure_is_bitsandbytes_own(updates):
    model = tiny()
    wire(model)
    optimizer = eight_bit(model)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[-1] < losses[0] and not updates


def test_a_step_between_forward_and_backward_is_an_error_not_a_wrong_gradient():
    model = tiny()
    wire(model)
    optimizer = eight_bit(model)
    train(model, optimizer, 1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    late = model(input_ids=IDS, labels=IDS).loss
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_without_a_wired_model_torch_has_no_hook_of_ours():
    hooks = len(torch_optimizer._global_optimizer_pre_hooks)
    first, second = wire(tiny()), wire(tiny())
    assert len(torch_optimizer._global_optimizer_pre_hooks) == max(hooks, 1)
    first.undo(), second.undo()
    assert len(torch_optimizer._global_optimizer_pre_hooks) in (0, hooks)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bnb_8bit"])
def test_trainers_own_8_bit_optimizer_is_one_of_them(name, updates, tmp_path):
    model = tiny(r=64)  # bitsandbytes' least for 8-bit state is 4,096 elements
    wire(model)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(3, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        optim=name,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert [options.step for _, options in updates] == [2, 3]


@pytest.mark.gpu
def test_on_a_card_all_adapters_take_one_launch_and_train_as_with_bitsandbytes():
    model = tiny().cuda()
    wiring.wire(model)
    optimizer, ids = eight_bit(model), IDS.cuda()

    class Plain(bnb.optim.AdamW8bit):
        """A subclass is passed by."""

    other = tiny().cuda()
    wiring.wire(other)
    for trained, stepper in ((model, optimizer), (other, eight_bit(other, Plain))):
        for _ in range(3):
            stepper.zero_grad()
            trained(input_ids=ids, labels=ids).loss.backward()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
            ) as seen:
                stepper.step()
                torch.cuda.synchronize()
        launches = sum(event.name == "_update" for event in seen.events())
        assert launches == (trained is model)
    assert_close(adapters(model), adapters(other))
