"""Recorded layers give the bits of layers that run as ever, through all that happens between passes."""

from __future__ import annotations

import copy
import gc
from collections import Counter

import pytest
import torch
import torch.utils.checkpoint
from hotloop.wiring import receipt_of, wire
from hotloop.wiring.layer import Shared
from hotloop_core.errors import PlanError
from hotloop_engine.blocks import graphs
from hotloop_engine.blocks.recorded import Recording
from hotloop_engine.blocks.recorder import KINDS, PASSES_BEFORE
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 101, "max_position_embeddings": 256,
}  # fmt: skip
LAYERS = SIZES["num_hidden_layers"]
PASSES = PASSES_BEFORE + 3
replayed: Counter[bool] = Counter()
"""Forwards of recorded layers so far."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    monkeypatch.setattr(Shared, "_room", lambda self, device: 2**30)
    replayed.clear()
    forward = Recording.forward

    def counted(self, x_TD):
        replayed[True] += 1
        return forward(self, x_TD)

    monkeypatch.setattr(Recording, "forward", counted)
    if request.param == "cpu":
        request.getfixturevalue("graphs_on_cpu")
    return torch.device(request.param)


def build(device, kind="llama", **lora):
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        layers = ["sliding_attention", "sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=layers))
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    model = get_peft_model(model.to(device, torch.bfloat16), LoraConfig(**{**options, **lora}))
    return model.train()


def pair(device, kind="llama", **lora):
    """The same model twice: one whose layers are recorded, one whose are not."""
    one, other = build(device, kind, **lora), build(device, kind, **lora)
    wire(one)
    wire(other, cuda_graphs=False)
    return one, other


def ids_of(device, batch=2, length=12, seed=0):
    return torch.randint(101, (batch, length), generator=torch.Generator().manual_seed(seed)).to(
        device
    )


def step(model, ids, **more):
    loss = model(input_ids=ids, labels=ids, **more).loss
    loss.backward()
    return loss


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(one, other):
    for (name, p), q in zip(trained(one).items(), trained(other).values(), strict=True):
        assert torch.equal(p, q), name
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def update(*models):
    for model in models:
        with torch.no_grad():
            for p in trained(model).values():
                if p.grad is not None:
                    p -= 0.05 * p.grad
                    p.grad = None


def kinds_of(model):
    return [k for k in receipt_of(model).shared.recorder._kinds.values() if k.layers]


def recorded(model):
    return sum(r._backward is not None for k in kinds_of(model) for r in k.layers.values())


def warmed(device):
    """A pair of which the first is recorded for `ids_of(device)`."""
    one, other = pair(device)
    for _ in range(PASSES):
        for model in (one, other):
            step(model, ids_of(device))
        assert_equal(one, other)
        update(one, other)
    assert recorded(one) == LAYERS
    assert not recorded(other)
    assert replayed[True] == LAYERS * (PASSES - PASSES_BEFORE)
    return one, other


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_training_by_recordings_gives_the_same_bits(device, kind):
    one, other = pair(device, kind)
    for seed in range(PASSES + 4):
        ids = ids_of(device, seed=seed)
        losses = [step(model, ids) for model in (one, other)]
        assert torch.equal(*losses), seed
        assert_equal(one, other)
        update(one, other)
    assert replayed[True] == LAYERS * (PASSES + 4 - PASSES_BEFORE)


def test_gradients_accumulate_over_recorded_passes(device):
    one, other = warmed(device)
    for seed in range(3):
        for model in (one, other):
            step(model, ids_of(device, seed=seed))
    assert_equal(one, other)
    assert replayed[True] == LAYERS * (PASSES - PASSES_BEFORE + 3)


@pytest.mark.parametrize("together", [True, False], ids=["one backward", "one after the other"])
def test_a_pass_that_begins_before_the_backward_of_another_leaves_it_alone(device, together):
    one, other = warmed(device)
    for model in (one, other):
        batches = [ids_of(device, seed=seed) for seed in (5, 6)]
        losses = [model(input_ids=ids, labels=ids).loss for ids in batches]
        for loss in [losses[0] * 2 + losses[1]] if together else losses:
            loss.backward()
    assert_equal(one, other)
    assert replayed[True] == LAYERS * (PASSES - PASSES_BEFORE + 1)


def test_a_loss_that_is_thrown_away_frees_the_recording(device):
    one, _ = warmed(device)
    loss = one(input_ids=ids_of(device), labels=ids_of(device)).loss
    (kind,) = kinds_of(one)
    assert kind.busy
    del loss
    gc.collect()
    assert not kind.busy


def test_a_loss_that_is_held_after_its_backward_does_not_keep_the_recording(device):
    one, _ = warmed(device)
    loss = step(one, ids_of(device))
    (kind,) = kinds_of(one)
    assert loss.grad_fn is not None
    assert not kind.busy


def test_a_second_backward_through_a_recorded_pass_is_refused(device):
    one, _ = warmed(device)
    logits = one(input_ids=ids_of(device)).logits
    loss = logits.float().square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(PlanError, match="backward ran a second time"):
        loss.backward()


def test_what_changes_between_passes_is_seen(device):
    """Scale, adapters switched off and on, another adapter, frozen ones, moved ones, weights written in place."""
    one, other = warmed(device)
    ids = ids_of(device)

    def every(change):
        for model in (one, other):
            change(model)
        for model in (one, other):
            step(model, ids)
        assert_equal(one, other)
        update(one, other)

    def first(model):
        return model.base_model.model.model.layers[0]

    every(lambda m: m.base_model.model.model.layers[1].mlp.down_proj.scaling.update(default=0.5))
    every(lambda m: first(m).self_attn.q_proj.lora_A["default"].weight.requires_grad_(False))
    every(lambda m: first(m).self_attn.q_proj.lora_A["default"].weight.requires_grad_(True))

    def moved(model):
        b = first(model).mlp.up_proj.lora_B["default"].weight
        b.data = b.data.clone() * 2

    every(moved)

    def written(model):
        with torch.no_grad():
            first(model).mlp.up_proj.base_layer.weight.mul_(1.5)
            first(model).input_layernorm.weight.mul_(1.25)

    every(written)
    assert recorded(one) == LAYERS
    assert replayed[True] == LAYERS * (PASSES - PASSES_BEFORE + 5)


def test_a_reference_pass_without_adapters_in_between_changes_nothing(device):
    one, other = pair(device)
    ids = ids_of(device)
    found = []
    for model in (one, other):
        for seed in range(PASSES + 2):
            with torch.no_grad(), model.disable_adapter():
                reference = model(input_ids=ids, labels=ids).loss
            step(model, ids_of(device, seed=seed))
            update(model)
        found.append(reference)
    assert torch.equal(*found)
    assert_equal(one, other)
    assert replayed[True] == LAYERS * (PASSES + 2 - PASSES_BEFORE)
    (kind,) = kinds_of(one)
    assert all(r._tries == 1 for r in kind.layers.values())


def test_generation_and_evaluation_in_between_change_nothing(device):
    one, other = warmed(device)
    ids = ids_of(device)
    texts = []
    for model in (one, other):
        model.eval()
        with torch.no_grad():
            texts.append(
                model.generate(ids[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
            )
            model(input_ids=ids, labels=ids)
        model.train()
        step(model, ids)
    assert torch.equal(*texts)
    assert_equal(one, other)


def test_shapes_in_turn_have_recordings_of_their_own_and_too_many_take_turns(device):
    one, other = pair(device)
    lengths = range(4, 4 + KINDS + 2)
    for seed in range(PASSES_BEFORE + 2):
        for length in lengths:
            for model in (one, other):
                step(model, ids_of(device, length=length, seed=seed))
            assert_equal(one, other)
            update(one, other)
    assert len(kinds_of(one)) == KINDS


def test_the_hidden_states_that_a_caller_asks_for_stay_what_they_are(device):
    one, _ = warmed(device)
    ids = ids_of(device)
    held = one(input_ids=ids, labels=ids, output_hidden_states=True).hidden_states
    before = [h.detach().clone() for h in held]
    step(one, ids_of(device, seed=3))
    assert all(torch.equal(h, b) for h, b in zip(held, before, strict=True))


def test_what_a_hook_on_a_layer_keeps_stays_what_it_is(device):
    one, _ = warmed(device)
    ids = ids_of(device)
    kept = []

    def keep(module, args, output):
        kept.append(output)

    handle = one.base_model.model.model.layers[1].register_forward_hook(keep)
    step(one, ids)
    before = kept[0].detach().clone()
    step(one, ids_of(device, seed=3))
    handle.remove()
    assert torch.equal(kept[0], before)


def test_what_an_outer_checkpoint_or_a_hook_on_saved_tensors_does_is_as_ever(device):
    one, other = warmed(device)
    ids = ids_of(device)
    for model in (one, other):
        with torch.autograd.graph.save_on_cpu():
            step(model, ids)

        def whole(x, model=model):
            return model(input_ids=x, labels=x).loss

        torch.utils.checkpoint.checkpoint(whole, ids, use_reentrant=False).backward()
    assert_equal(one, other)


def test_packed_rows_that_divide_elsewhere_are_told_apart(device):
    """As many tokens in as many sequences, the longest as long: the same recording, other offsets."""
    one, other = pair(device)
    ids = ids_of(device, batch=1)
    for n in range(PASSES):
        lengths = (5, 7) if n % 2 else (7, 5)
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        for model in (one, other):
            step(model, ids, position_ids=positions)
        assert_equal(one, other)
        update(one, other)
    assert replayed[True] == LAYERS * (PASSES - PASSES_BEFORE)


def test_the_gradient_of_embeddings_that_are_passed_in_accumulates(device):
    one, other = pair(device)
    leaf = torch.randn(2, 12, SIZES["hidden_size"]).to(device, torch.bfloat16)
    leaves = [leaf.clone().requires_grad_() for _ in range(2)]
    for _ in range(PASSES):
        for model, given in zip((one, other), leaves, strict=True):
            model(inputs_embeds=given, labels=ids_of(device)).loss.backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert replayed[True] == LAYERS * (PASSES - PASSES_BEFORE)


def test_positions_of_one_row_or_of_each_are_told_apart(device):
    one, other = warmed(device)
    ids = ids_of(device)
    for rows in (2, 1, 2):
        positions = torch.arange(ids.shape[1], device=device).expand(rows, -1)
        for model in (one, other):
            step(model, ids, position_ids=positions)
        assert_equal(one, other)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"modules_to_save": ["up_proj"]}])
def test_dropout_and_trained_weights_are_not_recorded(device, lora):
    lora = {"target_modules": ["q_proj", "down_proj"], **lora}
    one, other = pair(device, **lora)
    for _ in range(PASSES):
        for model in (one, other):
            torch.manual_seed(4)
            step(model, ids_of(device))
        assert_equal(one, other)
        update(one, other)
    assert not recorded(one)


@pytest.mark.parametrize("way", ["_run_forward", "_run_backward"])
def test_what_cannot_be_recorded_is_said_and_runs_as_ever(device, monkeypatch, way):
    one, other = pair(device)
    real = graphs.capture

    def fails(work, *where):
        if work.__name__ == way:
            raise RuntimeError("operation not permitted when stream is capturing")
        return real(work, *where)

    monkeypatch.setattr(graphs, "capture", fails)
    with pytest.warns(UserWarning, match=r"could not be recorded as a CUDA graph \(operation not"):
        for _ in range(PASSES):
            for model in (one, other):
                step(model, ids_of(device))
            assert_equal(one, other)
            update(one, other)
    assert not recorded(one)


def test_a_copy_of_the_model_has_recordings_of_its_own(device):
    one, other = warmed(device)
    ids = ids_of(device)
    twin = copy.deepcopy(one)
    assert not recorded(twin)
    for model in (one, other, twin):
        step(model, ids)
    assert_equal(one, other)
    assert_equal(twin, other)


def test_undo_takes_the_recordings_along(device):
    one, other = warmed(device)
    for model in (one, other):
        receipt_of(model).undo()
        step(model, ids_of(device))
    assert_equal(one, other)
