import copy
import pickle

from hotloop_core import LayerPlan, Placement, Plan, discover, facts_of, saved_tensors
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL, amount

GIB = 2**30


def made(**options):
    layers = (RECOMPUTE_ALL,) * 2 + (KEEP_ALL,)
    defaults = {"tokens": 2048, "longest": 1024, "memory": {"weights": 3 * GIB, "rest": GIB // 2}}
    return Plan(layers=layers, **{**defaults, **options})


def test_a_tensor_that_is_not_named_is_kept():
    layer = LayerPlan(placements={"qkv": Placement.OFFLOAD})
    assert layer.placement("qkv") is Placement.OFFLOAD
    assert layer.placement("gate_up") is Placement.KEEP


CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}


def tensors_of(model_type, **changes):
    config = {"model_type": model_type, **CONFIG, **changes}
    return saved_tensors(facts_of(discover().match(config), config))


def test_saved_tensors_of_a_dense_layer():
    tensors = tensors_of("llama", hidden_act="silu")
    sizes = {t.name: t.elements for t in tensors}
    assert sizes == {"x": 64, "qkv": 128, "attention": 64, "x_mid": 64, "gate_up": 192}
    assert {t.name: t.flops for t in tensors}["gate_up"] == 2 * 64 * 192


def test_norms_behind_the_blocks_need_what_they_normed():
    tensors = {t.name: t for t in tensors_of("gemma2")}
    assert list(tensors) == [
        "x", "qkv", "attention", "attention_out", "x_mid", "gate_up", "mlp_out"
    ]  # fmt: skip
    assert (tensors["attention_out"].elements, tensors["attention_out"].flops) == (64, 2 * 64 * 64)
    assert (tensors["x_mid"].elements, tensors["x_mid"].flops) == (64, 0)
    assert (tensors["mlp_out"].elements, tensors["mlp_out"].flops) == (64, 2 * 64 * 96)


def test_recompute_all_names_every_tensor_that_can_be_recomputed():
    for tensors in (tensors_of("llama", hidden_act="silu"), tensors_of("gemma2")):
        assert {t.name for t in tensors if t.can_recompute} <= RECOMPUTE_ALL.placements.keys()
    assert "x" not in RECOMPUTE_ALL.placements


def test_the_peak_is_the_sum_of_its_parts():
    assert made().peak_bytes == 3.5 * GIB


def test_a_plan_prints_layers_in_groups_memory_and_time():
    text = str(made(budget=4 * GIB, step_ms={"GEMMs": 60.0, "attention": 40.0}, card="H100"))
    assert "layers 0 to 1: recompute everything" in text
    assert "layer 2: keep everything" in text
    assert "3.50 GiB of 4.00 GiB" in text
    assert "100.0 ms on H100, 20,480 tokens/s" in text
    assert "weights streamed" in str(LayerPlan(streamed=True))


def test_streamed_weights_and_alternating_inputs_do_not_break_a_run_of_layers():
    lean = dict(RECOMPUTE_ALL.placements)
    stored = LayerPlan(placements={"x": Placement.OFFLOAD, **lean}, streamed=True)
    remade = LayerPlan(placements={"x": Placement.RECOMPUTE, **lean})
    plan = Plan(
        layers=(stored, remade, stored, remade, KEEP_ALL),
        tokens=1 << 17,
        longest=1 << 17,
        tile=4096,
        embedding_on_host=True,
        head_on_host=True,
        host_memory={"activations": 2 * GIB, "embedding": GIB},
    )
    assert str(plan).splitlines()[1:] == [
        "  layers 0 to 3: x offload in 2, recompute in 2; recompute everything",
        "  layer 4: keep everything",
        "  weights of 2 of 5 layers streamed",
        "  embedding and head on the host",
        "  4,096 tokens at once but in attention",
        f"  {'host: activations':<34}{'2.00 GiB':>12}",
        f"  {'host: embedding':<34}{'1.00 GiB':>12}",
        f"  {'pinned host memory':<34}{'3.00 GiB':>12}",
    ]
    assert plan.host_bytes == 3 * GIB
    assert str(stored) == "offload x; recompute everything; weights streamed from host memory"


def test_a_run_that_differs_in_its_inputs_alone_is_one_line():
    away = LayerPlan(placements={"x": Placement.OFFLOAD})
    text = str(Plan(layers=(away, away, KEEP_ALL), tokens=8, longest=8))
    assert text.splitlines()[1] == "  layers 0 to 2: x keep in 1, offload in 2; keep all else"


def test_lossy_keys_and_values_are_named_so():
    assert "(lossy)" in str(LayerPlan(nf4_kv=True))


def test_a_plan_without_a_prediction_prints_its_layers_alone():
    text = str(made(memory={}, notes=("a note",)))
    assert text.splitlines()[1:] == [
        "  layers 0 to 1: recompute everything",
        "  layer 2: keep everything",
        "  a note",
    ]


def test_a_plan_can_be_copied_and_pickled_with_the_model_that_holds_it():
    assert copy.deepcopy(made()) == made()
    assert pickle.loads(pickle.dumps(made())) == made()


def test_amounts_are_readable_at_every_size():
    assert amount(3.41 * GIB) == "3.41 GiB"
    assert amount(5 * 2**20) == "5.0 MiB"
