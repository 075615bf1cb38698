import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hotloop.planner import (
    Request,
    checkpointing_placements,
    outlook,
    plan,
    plan_larger,
)
from hotloop.planner.job import OPTIMIZER_BYTES, Job
from hotloop.planner.timing import OPTIMIZER_TENSOR_MS, attention_flops
from hotloop_core import Placement, discover, facts_of
from hotloop_core.errors import BudgetError, ConfigError, NoFamilyError, PlanError
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 2**20,
    "rope_theta": 5e5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}


def job(config=LLAMA_8B, **options):
    facts = facts_of(discover().match(config), config)
    defaults = {"tokens": 4096, "longest": 2048, "bits": 4, "width": 2, "ranks": {}, "full": False}
    return Job(facts=facts, optimizer="adamw_8bit", **{**defaults, **options})


def h100(config=LLAMA_8B, **options):
    return plan(config, **{"tokens": 4096, "lora": 16, "card": "H100", **options})


def test_weights_are_what_an_8b_model_measures_after_loading():
    # 5.47 GiB in 4 bit, LoRA of rank 16 in fp32 included: facts/field.md's measurement.
    lora = sum(16 * (n + k) for n, k in job().facts.linear_shapes().values()) * 32 * 4
    assert (job().weights + lora) / GIB == pytest.approx(5.47, abs=0.02)
    assert job(bits=16).weights / GIB == pytest.approx(8.03e9 * 2 / GIB, rel=0.001)


def test_the_fastest_plan_without_a_bound_keeps_everything():
    assert h100(vram="1000GiB", dequantised=False).layers == (KEEP_ALL,) * 32
    assert h100(vram="1000GiB").layers == (replace(KEEP_ALL, dequantised=True),) * 32


def test_a_step_takes_what_the_measured_floor_takes():
    # 20,100 tokens/s of GEMMs and attention alone at 8 x 2048 on an H100 (design.md).
    step = plan(LLAMA_8B, tokens=16384, longest=2048, lora=16, card="H100").step_ms
    floor = step["GEMMs"] + step["attention"] + step["head and loss"]
    assert 16384 / floor * 1e3 == pytest.approx(20_100, rel=0.05)


def test_an_optimizer_that_waits_for_the_card_after_each_tensor_takes_longest():
    assert OPTIMIZER_TENSOR_MS.keys() == OPTIMIZER_BYTES.keys()
    ms = {name: h100(optimizer=name).step_ms["optimizer"] for name in OPTIMIZER_BYTES}
    assert ms["paged_adamw_8bit"] == pytest.approx(50, abs=1)  # measured, 448 tensors
    assert ms["adamw_torch"] == ms["adamw_torch_fused"] == pytest.approx(20, abs=1)
    assert ms["adamw_8bit"] < 3
    full = h100(bits=16, lora=None, full_finetuning=True, vram="200GiB").step_ms["optimizer"]
    assert full > 15  # fewer tensors, large ones: the card's memory bounds it


def test_less_memory_is_never_faster_and_every_plan_keeps_its_budget():
    times, budgets = [], [8, 9, 10, 12, 14, 16, 18, 20]
    for gib in budgets:
        made = h100(vram=f"{gib}GiB")
        assert made.peak_bytes <= gib * GIB == made.budget
        times.append(sum(made.step_ms.values()))
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_the_layers_that_keep_less_come_first():
    made = h100(vram="12GiB", host="1GiB")
    saved = job().saved
    kept = [
        sum(s.elements for s in saved if layer.placement(s.name) is Placement.KEEP)
        for layer in made.layers[:-1]
    ]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_the_last_layer_sends_nothing_away():
    made = h100(vram="6GiB")
    assert Placement.OFFLOAD in made.layers[0].placements.values()
    assert Placement.OFFLOAD not in made.layers[-1].placements.values()


@pytest.mark.slow
def test_streamed_layers_are_spread_evenly():
    seen = 0
    for gib in range(5, 30, 2):
        made = h100(tokens=16384, longest=2048, vram=f"{gib}GiB")
        streamed = [layer.streamed for layer in made.layers]
        count = sum(streamed)
        for start in range(0, 32, 8):  # every quarter has its share, to within one
            assert abs(sum(streamed[start : start + 8]) - count / 4) <= 1
        assert made.host_memory.get("weights", 0) == count * job().layer_weights
        seen += 0 < count < 32
    assert seen > 2


def test_a_budget_that_nothing_fits_names_the_least_and_what_to_change():
    with pytest.raises(BudgetError, match=r"the budget is 3\.00 GiB") as caught:
        h100(tokens=65536, vram="3GiB")
    message = str(caught.value)
    least = float(message.split("raise the budget to ")[1].split(" GiB")[0])
    assert h100(tokens=65536, vram=f"{least + 0.01}GiB").budget
    longest = int(message.split("train at most ")[1].split(" tokens")[0].replace(",", ""))
    assert h100(tokens=longest, vram="3GiB").peak_bytes <= 3 * GIB
    with pytest.raises(BudgetError):
        h100(tokens=longest + 64, vram="3GiB")


def test_a_host_that_is_too_small_is_named_with_what_it_lacks():
    with pytest.raises(BudgetError, match="of host memory be pinned") as caught:
        h100(tokens=131072, vram="23GiB", host="2GiB")
    needed = float(str(caught.value).split("let ")[1].split(" GiB")[0])
    assert h100(tokens=131072, vram="23GiB", host=f"{needed + 0.01}GiB").host_bytes > 2 * GIB


def test_no_plan_pins_more_than_the_host_has():
    for gib in (4, 8, 16, 64):
        made = h100(tokens=65536, vram="20GiB", host=f"{gib}GiB")
        assert made.host_bytes <= gib * GIB
    assert made.host_bytes == sum(made.host_memory.values()) > 16 * GIB


def test_an_input_is_stored_for_every_few_layers_where_the_host_is_small():
    made = h100(tokens=131072, vram="20GiB", host="24GiB")
    inputs = [layer.placement("x") for layer in made.layers]
    assert Placement.RECOMPUTE in inputs
    assert inputs[0] is not Placement.RECOMPUTE  # nothing below it to start from


def test_fixed_placements_are_taken_and_checked_against_the_budget():
    assert h100(placements="recompute").layers == (RECOMPUTE_ALL,) * 32
    made = h100(placements={"gate_up": "recompute"})
    assert made.fixed
    assert made.layers[0].placement("gate_up") is Placement.RECOMPUTE
    assert made.layers[0].placement("qkv") is Placement.KEEP
    with pytest.raises(BudgetError, match="let the planner choose"):
        h100(placements="keep", vram="9GiB")


def test_offloaded_checkpointing_offloads_every_input_but_the_last():
    made = h100(placements="offload", vram="12GiB")
    assert [layer.placement("x") for layer in made.layers] == [Placement.OFFLOAD] * 31 + [
        Placement.KEEP
    ]
    assert {layer.placement("gate_up") for layer in made.layers} == {Placement.RECOMPUTE}
    assert not any(layer.streamed for layer in made.layers)
    assert not made.embedding_on_host
    assert made.host_memory == {"activations": 31 * 4096 * 4096 * 2}


@pytest.mark.parametrize(
    "value, placements",
    [
        (True, "recompute"),
        (False, "keep"),
        ("offload", "offload"),
        (None, None),
        ("auto", None),
        ("unsloth", None),
    ],
)
def test_the_fields_checkpointing_values_map_to_placements(value, placements):
    assert checkpointing_placements(value) == placements


def test_another_checkpointing_value_is_refused():
    with pytest.raises(ConfigError, match="'offload'"):
        checkpointing_placements("sometimes")


@pytest.mark.parametrize(
    "placements, error, says",
    [
        ({"gate_up": "shelve"}, ConfigError, "keep, offload, recompute"),
        ({"logits": "keep"}, ConfigError, "gate_up"),
        ({"x": "recompute"}, PlanError, "cannot be recomputed in every layer"),
        ("shelve", ConfigError, "'keep', 'recompute', 'offload'"),
    ],
)
def test_placements_that_cannot_be_are_refused(placements, error, says):
    with pytest.raises(error, match=says):
        h100(placements=placements)


def test_keys_and_values_in_nf4_are_counted_and_never_chosen():
    assert not any(layer.nf4_kv for layer in h100(vram="4GiB").layers)
    exact, lossy = h100(placements="keep"), h100(placements="keep", nf4_kv=True)
    assert all(layer.nf4_kv for layer in lossy.layers)
    saved = 32 * 4096 * 2 * 8 * 128 * (2 - 0.5 - 4 / 64)
    kept = "activations kept for backward"
    assert exact.memory[kept] - lossy.memory[kept] == pytest.approx(saved)
    assert "lossy" in str(lossy)
    assert not any(
        layer.nf4_kv for layer in h100(placements="recompute", nf4_kv=True).layers
    )  # recomputed: nothing waits


def test_nf4_stays_asked_for_where_the_first_layers_have_nothing_that_waits():
    made = h100(tokens=16384, vram="18GiB", host=0, nf4_kv=True)
    assert 0 < sum(layer.nf4_kv for layer in made.layers) < 32
    assert not made.layers[0].nf4_kv
    assert any(layer.nf4_kv for layer in plan_larger(LLAMA_8B, made, tokens=16400).layers)


def test_weights_stay_where_a_plan_has_put_them():
    first = h100(vram="3.4GiB")
    again = h100(tokens=2048, vram="30GiB", homes=first)
    assert [layer.streamed for layer in again.layers] == [layer.streamed for layer in first.layers]
    assert (again.embedding_on_host, again.head_on_host) == (
        first.embedding_on_host,
        first.head_on_host,
    )
    assert any(layer.streamed for layer in again.layers)


def test_what_an_earlier_plan_has_pinned_is_used_again(monkeypatch):
    monkeypatch.setattr("hotloop.planner.host.free_host_memory", lambda: 0)
    first = plan(LLAMA_8B, tokens=4096, vram="3.4GiB", host="16GiB")
    monkeypatch.setattr("hotloop.planner.host._pinned", lambda: first.host_bytes)
    again = plan(LLAMA_8B, tokens=4096, vram="3.4GiB", homes=first)
    assert 0 < again.host_bytes <= first.host_bytes
    with pytest.raises(BudgetError, match="of host memory be pinned"):
        plan(LLAMA_8B, tokens=4096, vram="2.4GiB")


def test_trained_weights_stay_on_the_device():
    made = plan(LLAMA_8B, tokens=2048, bits=16, full_finetuning=True, card="H200", vram="60GiB")
    assert not made.host_memory.keys() & {"weights", "embedding", "head"}


def test_tied_weights_move_together():
    config = {**LLAMA_8B, "tie_word_embeddings": True}
    request = Request(tokens=32768, card="H100")
    tied = plan(config, tokens=32768, card="H100", vram=outlook(config, request).least)
    assert tied.embedding_on_host
    assert tied.head_on_host
    assert "head" not in tied.host_memory  # one weight, counted once


def test_more_rank_more_bits_and_more_training_need_more_memory():
    def peak(**options):
        made = plan(LLAMA_8B, tokens=2048, vram="1000GiB", dequantised=False, **options)
        return made.peak_bytes

    assert peak(lora=None) < peak(lora=8) < peak(lora=64) < peak(lora=64, bits=16)
    assert peak(lora={"q": 8}) < peak(lora=8)
    assert peak(bits=16) < peak(bits=16, full_finetuning=True)
    assert peak(bits=16, full_finetuning=True) < peak(
        bits=16, full_finetuning=True, optimizer="adamw_torch"
    )


def test_a_window_costs_less_than_full_attention():
    full = job(longest=4096)
    windowed = job(longest=4096)
    object.__setattr__(windowed.facts, "windows", (1024,) * 32)
    assert attention_flops(windowed) == pytest.approx(
        attention_flops(full) * (1024 - 1024**2 / 8192) / 2048
    )


def test_a_plan_is_read_from_a_config_file_without_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    code = (
        "import sys; from hotloop.planner import plan;"
        f"made = plan({str(tmp_path)!r}, tokens=8192, lora=16, card='RTX 4090');"
        "print(made); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert "on RTX 4090" in done.stdout
    assert "the longest single sequence in this budget is" in done.stdout
    assert "data sheet" in done.stdout


def test_a_family_that_is_not_installed_or_not_counted_is_named():
    with pytest.raises(NoFamilyError, match="phi4"):
        plan({**LLAMA_8B, "model_type": "phi4"}, tokens=10)


def test_a_model_is_measured_with_its_adapters(tiny_llama):
    from hotloop.loading import load
    from hotloop.lora import add_lora

    model, _ = load(tiny_llama, bits=4, max_seq_len=64, wire=False, device="cpu", dtype="bfloat16")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    before = plan(model, tokens=64)
    assert size < before.memory["weights"] < 1.1 * size  # and the quantisation's statistics
    foreseen = plan(model, tokens=64, lora=8).memory["adapters, gradients, optimizer"]
    adapted = add_lora(model, r=8)
    made = plan(adapted, tokens=64, vram="1GiB", optimizer="adamw_torch")
    larger = plan_larger(adapted, made, tokens=128, longest=64)
    assert (larger.tokens, larger.longest, larger.budget) == (128, 64, GIB)
    trained = "adapters, gradients, optimizer"
    assert larger.memory[trained] == made.memory[trained]  # a model does not tell its optimizer
    found = plan(adapted, tokens=64).memory
    assert found["adapters, gradients, optimizer"] == foreseen
    assert found["weights"] == before.memory["weights"]


def test_a_config_that_leaves_out_what_its_family_defaults_is_planned():
    sizes = {k: v for k, v in LLAMA_8B.items() if k not in ("rope_theta", "hidden_act")}
    for spec in discover().families:
        for model_type in spec.model_types:
            config = {
                **sizes,
                "model_type": model_type,
                "num_hidden_layers": 2,
                "sliding_window": 8,
            }
            made = plan(
                config, tokens=64, lora={next(iter(facts_of(spec, config).linear_shapes())): 8}
            )
            assert len(made.layers) == 2


def test_a_path_may_name_the_config_itself(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
        "hidden_act": "silu",
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert plan(path, tokens=64).layers == plan(config, tokens=64).layers
    path.write_text("[]")
    with pytest.raises(ConfigError, match="holds list"):
        plan(path, tokens=64)


@pytest.mark.parametrize("options", [{}, {"bits": 16}, {"placements": "offload"}, {"lora": None}])
@pytest.mark.parametrize("host", ["1MiB", "2GiB", "64GiB"])
def test_a_refusal_names_memory_that_is_enough(options, host):
    with pytest.raises(BudgetError) as refused:
        h100(vram="1GiB", host=host, **options)
    found = re.search(
        r"at least ([\d.]+ [GM]iB).* To fit: (let ([\d.]+ [GM]iB) of host)?", str(refused.value)
    )
    made = h100(vram=found[1], host=found[3] or host, **options)
    assert made.peak_bytes <= made.budget


def test_a_refusal_proposes_nothing_that_would_not_do():
    with pytest.raises(BudgetError) as refused:
        h100(bits=16, vram="1MiB", host="64GiB", lora=1)
    assert "4 bit" not in str(refused.value)
    assert "rank" not in str(refused.value)
    with pytest.raises(BudgetError, match="load the base in 4 bit"):
        h100(bits=16, vram="8GiB", host="1GiB")


def test_the_ranks_of_a_model_are_read_from_its_adapters():
    from hotloop.lora import add_lora
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    options = {"tokens": 64, "bits": 16, "dtype": "float32"}
    expected = plan(config, lora={"q": 5, "down": 5}, **options).memory
    found = plan(add_lora(model, r=5, targets=["q", "down"]), **options).memory
    for name in ("activations kept for backward", "working set of a layer or the loss"):
        assert found[name] == expected[name]
