"""A packed row trains as it would alone: the same loss and the same gradients, in every attention backend of a CPU."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from hotloop.training.loss import weighted_loss
from hotloop.wiring import wire
from hotloop_core.errors import DataError, NoImplementationError, WireError
from hotloop_core.packing import PackedBatch
from hotloop_engine.attention.backends import BACKENDS
from hotloop_testkit.numerics import assert_no_worse_than, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 101
CAPACITY = 96
LENGTHS = [
    [1, 2, 63, 30],
    [CAPACITY],
    [1] * 17 + [40, 1, 1, 1],
    [2, 1, 2, 1, 33],
]
ON_CPU = [
    "reference",
    "sdpa_cpu",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="needs a CUDA device or the interpreter, not both"
        ),
    ),
]
WINDOWED = {
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 16, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}


def tiny(kind: str = "llama", **changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted


def rows_of(lengths: Sequence[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def gradients(model) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def packed(model, rows: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token [T], and every gradient of their sum."""
    batch = PackedBatch.from_rows(rows)
    device = next(model.parameters()).device
    inputs = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v
        for k, v in batch.model_inputs().items()
    }
    weights_T = torch.ones(len(batch.input_ids), requires_grad=True, device=device)
    loss = weighted_loss(model, inputs, weights_T, num_items=1)
    loss.backward()
    assert weights_T.grad is not None
    losses_T = weights_T.grad  # the loss is linear in the weights
    return losses_T, gradients(model)


def apart(model, rows: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """As `packed`, row after row through the model's own forward, padding and packing unknown to it."""
    losses: list[Tensor] = []
    for row in rows:
        ids = torch.tensor([row], device=next(model.parameters()).device)
        logits = model(input_ids=ids).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nll = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        if len(row) > 1:
            nll.sum().backward()
        losses.append(torch.cat([nll.new_zeros(1), nll.detach()]))
    return torch.cat(losses), gradients(model)


def assert_equal_training(found, expected, tolerance: float = 1e-5) -> None:
    losses, theirs = found[0], expected[0]
    assert relative_error(losses, theirs) <= tolerance
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert relative_error(found[1][name], gradient) <= tolerance, name


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(backend, lengths):
    model, rows = tiny(), rows_of(lengths)
    expected = apart(model, rows)
    wire(model, attention=backend)
    assert_equal_training(packed(model, rows), expected)


@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows_stay_inside_rows(kind):
    model, rows = tiny(kind, **WINDOWED[kind]), rows_of([31, 4, 1, 20])
    expected = apart(model, rows)
    unwindowed = {**WINDOWED[kind], "sliding_window": 128}
    other = tiny(kind, **unwindowed)
    assert relative_error(apart(other, rows)[0], expected[0]) > 1e-3  # the window does something
    wire(model)
    assert_equal_training(packed(model, rows), expected)


@pytest.fixture(scope="module")
def pair():
    plain = tiny()
    wired = copy.deepcopy(plain)
    wire(wired)
    return plain, wired


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_any_lengths_train_as_they_would_alone(pair, lengths, seed):
    if max(lengths) == 1:
        lengths = [*lengths, 2]  # a row of one token predicts nothing
    plain, wired = pair
    rows = rows_of(lengths, seed)
    assert_equal_training(packed(wired, rows), apart(plain, rows))


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=7),
    data=st.data(),
)
def test_changing_one_row_changes_no_bit_of_another_rows_loss(pair, lengths, data):
    _, wired = pair
    rows = rows_of(lengths)
    changed = data.draw(st.integers(0, len(rows) - 1))
    others = [*rows]
    others[changed] = [3 + (token * 7 + 5) % 90 for token in rows[changed]]
    kept = torch.cat([torch.full((n,), i != changed) for i, n in enumerate(lengths)])
    before, after = packed(wired, rows)[0], packed(wired, others)[0]
    assert torch.equal(before[kept], after[kept])
    if lengths[changed] > 1:
        assert not torch.equal(before[~kept], after[~kept])


@pytest.mark.parametrize("backend", ["reference", "sdpa_cpu"])
def test_in_bf16_packed_rows_are_no_worse_than_eager_alone(backend):
    exact, rows = tiny(), rows_of([1, 2, 63, 30])
    eager, ours = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    wire(ours, attention=backend)

    def all_of(result):
        whole = torch.cat([gradient.double().flatten() for gradient in result[1].values()])
        return {"losses": result[0], "gradients": whole}

    assert_no_worse_than(
        all_of(packed(ours, rows)),
        all_of(apart(eager, rows)),
        all_of(apart(exact, rows)),
        slack=0.1,
        floor=8e-3,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "lengths", [[1, 2, 63, 30], [300], [1] * 60 + [40], [200, 1, 129]], ids=str
)
@pytest.mark.parametrize("name", [b.name for b in BACKENDS if "cuda" in b.capability.devices])
def test_on_a_card_packed_rows_train_as_they_would_alone(name, lengths, dtype):
    exact = tiny(hidden_size=128, head_dim=64, max_position_embeddings=512).to("cuda")
    eager, ours = (copy.deepcopy(exact).to(dtype) for _ in range(2))
    rows = rows_of(lengths)
    wire(ours, attention=name)
    try:
        losses_T, found = packed(ours, rows)
    except NoImplementationError as error:
        pytest.skip(f"needs a CUDA device where {name} can: {error}")
    truth = apart(exact.double(), rows)
    if dtype == torch.float32:
        assert_equal_training((losses_T, found), truth)
        return
    keys = list(truth[1])
    results = [
        {"losses": losses, "gradients": torch.cat([g[key].double().flatten() for key in keys])}
        for losses, g in ((losses_T, found), apart(eager, rows), truth)
    ]
    assert_no_worse_than(*results, slack=0.1, floor=8e-3)


def test_weights_multiply_the_loss_of_their_tokens_and_leave_the_divisor(pair):
    plain, wired = pair
    rows = rows_of([9, 14, 1, 6])
    weights = [0.5, [0.25 * i for i in range(14)], 3.0, 0]
    batch = PackedBatch.from_rows(rows, weights=weights)
    assert batch.weights is not None
    trained = sum(len(row) - 1 for row in rows)
    expected = 0.0
    for row, weight in zip(rows, weights, strict=True):
        ids = torch.tensor([row])
        logits = plain(input_ids=ids).logits
        nll = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        of_tokens = (
            torch.tensor(weight) if isinstance(weight, list) else torch.full((len(row),), weight)
        )
        expected = expected + (of_tokens[1:] * nll).sum() / trained
    expected.backward()
    loss = weighted_loss(wired, batch.model_inputs(), batch.weights)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    found, theirs = gradients(wired), gradients(plain)
    assert all(relative_error(found[name], value) <= 1e-5 for name, value in theirs.items())
    alike = weighted_loss(wired, batch.model_inputs(), torch.ones(30))
    torch.testing.assert_close(alike, wired(**batch.model_inputs()).loss, rtol=1e-6, atol=0)
    fewer = weighted_loss(wired, batch.model_inputs(), torch.ones(30), num_items=52)
    torch.testing.assert_close(fewer, alike * trained / 52, rtol=1e-6, atol=0)


def test_weights_that_nothing_would_use_are_refused(pair):
    plain, wired = pair
    batch = PackedBatch.from_rows(rows_of([5, 4]), weights=[1.0, 2.0])
    assert batch.weights is not None
    with pytest.raises(WireError, match=r"hotloop\.wire"):
        weighted_loss(plain, batch.model_inputs(), batch.weights)
    with pytest.raises(DataError, match=r"weights of shape \(3,\) for labels \(1, 9\)"):
        weighted_loss(wired, batch.model_inputs(), torch.ones(3))


@pytest.mark.parametrize("given", ["positions and borders", "positions", "borders"])
def test_a_layer_that_runs_the_models_own_code_sees_rows_apart_too(given):
    model, rows = tiny(), rows_of([9, 5, 12])
    expected = apart(model, rows)[0].sum() / 23
    model.base_model.model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    receipt = wire(model, allow_eager={"hooks"})
    assert len(receipt.left_alone) == 1
    inputs = PackedBatch.from_rows(rows).model_inputs()
    if given == "positions":
        inputs = {k: inputs[k] for k in ("input_ids", "labels", "position_ids")}
    if given == "borders":
        del inputs["position_ids"]
    assert float(model(**inputs).loss.detach()) == pytest.approx(float(expected), rel=1e-5)
