"""The search finds what evaluating every plan one by one finds, and its bytes are those of a walk through a step."""

from dataclasses import replace
from itertools import product
from math import inf

import pytest
from hotloop.planner import find_card, plan
from hotloop.planner.job import Job
from hotloop.planner.kinds import chosen, kinds, recompute_all
from hotloop.planner.search import fastest, homes_of, lean, least, spaces
from hotloop.planner.space import SLOTS, Bounds, Found, Homes, Space
from hotloop_core import Placement, discover, facts_of
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 2**20,
    "hidden_act": "silu",
}
POST_NORMS = {**CONFIG, "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}
GIB = 2**30


def job(config=CONFIG, **options):
    facts = facts_of(discover().match(config), config)
    ranks = dict.fromkeys(facts.linear_shapes(), 16)
    defaults = {"tokens": 2048, "longest": 1024, "bits": 4, "width": 2, "ranks": ranks}
    return Job(facts=facts, full=False, optimizer="adamw_8bit", **{**defaults, **options})


def slow_link():
    """A card on which offloading and streaming are neither free nor hopeless for so small a model."""
    return replace(find_card("RTX 4090"), link_gbs=6.0, launch_ms=(0.05, 0.1))


def weigh(space, early, count, late, streamed):
    """One plan of a space by plain numbers: (ms, host bytes, peak bytes)."""
    found = Found(
        ms=0.0, host=0, space=space, early=early, count=count, late=late, streamed=streamed
    )
    held = found.bytes()
    ms = round(float(sum(run.total for run in found.passes())) + space.outside, 6)
    return ms, int(held.away + held.host_weights + held.host_outside), int(space.peak(held))


def one_by_one(found, bounds):
    """(ms, host bytes) of the best plan, every one of the class looked at."""
    rows = []
    for space in found:
        size, layers = len(space.kinds), space.layers
        kept = [c.kept + c.x_kept / c.stride for c in space.costs]
        for early, late in product(range(size), repeat=2):
            for count in range(layers) if early != late and kept[early] <= kept[late] else [0]:
                for streamed in [0, *range(SLOTS + 1, layers + 1)]:
                    ms, host, peak = weigh(space, early, count, late, streamed)
                    if peak <= bounds.device and host <= bounds.host:
                        rows.append((ms, host))
    return min(rows, default=None)


@settings(max_examples=25, deadline=None)
@given(
    picked=st.sets(st.integers(0, 10**6), min_size=1, max_size=4),
    share=st.floats(0.0, 1.05),
    host=st.sampled_from([0.05, 0.5, 100.0]),
    tokens=st.sampled_from([600, 2048, 6000]),
)
def test_the_search_is_exact_within_its_class(picked, share, host, tokens):
    small = job(tokens=tokens, longest=600)
    every = kinds(small, None)
    assert_exact(small, [every[i % len(every)] for i in sorted(picked)], share, host)


@pytest.mark.parametrize("share", [i / 16 for i in range(17)])
def test_the_search_is_exact_between_the_least_memory_and_everything_kept(share):
    small = job()
    only = [chosen(small, {}), recompute_all(small), recompute_all(small, Placement.OFFLOAD)]
    only += [chosen(small, {"gate_up": Placement.RECOMPUTE, "x": Placement.OFFLOAD})]
    assert_exact(small, only, share, 100.0)


def assert_exact(small, only, share, host):
    candidates = list(spaces(small, slow_link(), homes_of(small)[-1:], only))
    most = max(weigh(s, k, 0, k, 0)[2] for s in candidates for k in range(len(s.kinds)))
    lowest = least(candidates, Bounds(device=inf))
    assert lowest is not None
    bounds = Bounds(device=int(lowest[0] + share * (most - lowest[0])), host=host * GIB)
    best, found = one_by_one(candidates, bounds), fastest(candidates, bounds)
    assert (None if found is None else found.order) == best


@pytest.mark.parametrize("config", [CONFIG, POST_NORMS])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
def test_every_plan_found_keeps_its_bounds_and_its_own_numbers(config, share):
    small, card = job(config), slow_link()
    found = list(spaces(small, card, homes_of(small)))
    lowest = least(found, Bounds())
    everything = fastest(found, Bounds())
    assert lowest is not None
    assert everything is not None
    most = int(everything.space.peak(everything.bytes()))
    bounds = Bounds(device=int(lowest[0] + share * (most - lowest[0])), host=4 * GIB)
    made = fastest(found, bounds)
    assert made is not None
    ms, host, peak = weigh(made.space, made.early, made.count, made.late, made.streamed)
    assert (ms, host) == made.order
    assert peak <= bounds.device
    assert host <= bounds.host


def walk(space: Space, found: Found):
    """(peak of activations, host bytes) by walking through a step, layer by layer."""
    small, layers = space.job, found.layers()
    split = [found.early] * found.count + [found.late] * (len(layers) - found.count)
    device = host = 0
    held = []
    for layer in layers:
        names = [s.name for s in small.saved]
        kept = sum(small.waiting[n] for n in names if layer.placement(n) is Placement.KEEP)
        away = sum(small.waiting[n] for n in names if layer.placement(n) is Placement.OFFLOAD)
        held.append(kept + small.small({n: layer.placement(n) for n in names}))
        device, host = device + held[-1], host + away
    costs = [space.costs[kind] for kind in split]
    head = (small.head or small.embedding) * space.homes.head
    # What is still leaving when forward ends: of the lower layers, and of the upper ones but the last.
    lower = (costs[0].away + costs[0].x_away) * (found.count > 0)
    upper = (costs[-1].away + costs[-1].x_away) * (found.count < len(layers) - 1)
    leaving, more = max(lower, upper), max(lower - upper, 0)
    moments = [device + max(small.loss + leaving, costs[-1].forward + more) + head]
    moments.append(device + costs[-1].last + leaving)
    for i in reversed(range(len(layers) - 1)):
        device -= held[i + 1]
        moments.append(device + costs[i].backward + more * (i >= found.count))
    return max(moments), host


@settings(max_examples=30, deadline=None)
@given(
    pick=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 4)),
    tile=st.sampled_from([None, 1024]),
    head=st.booleans(),
)
def test_the_peak_is_that_of_a_walk_through_the_step(pick, tile, head):
    space = Space(job(), slow_link(), tile).at(Homes(embedding=head, head=head))
    early, late = (i % len(space.kinds) for i in pick[:2])
    if early == late:
        late = (late + 1) % len(space.kinds)
    found = Found(ms=0.0, host=0, space=space, early=early, count=pick[2], late=late, streamed=0)
    held = found.bytes()
    peak, host = walk(space, found)
    assert held.kept + held.working == peak
    assert held.away == host


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(4096, 200_000), host=st.sampled_from([1.0, 8.0, 1000.0]))
def test_the_lean_spaces_hold_the_least_memory_of_long_sequences(tokens, host):
    small, card, bounds = job(tokens=tokens, longest=tokens), slow_link(), Bounds(host=host * GIB)
    short = least(lean(small, card, homes_of(small)), bounds)
    whole = least(spaces(small, card, homes_of(small)), bounds)
    assert (short and short[0]) == (whole and whole[0])


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(64, 100_000),
    more=st.integers(1, 50_000),
    placements=st.sampled_from(["keep", "recompute", "offload"]),
)
def test_a_larger_batch_never_needs_less(tokens, more, placements):
    def peak(size):
        return plan(
            CONFIG, tokens=size, lora=16, vram="1000GiB", host="9999GiB", placements=placements
        ).peak_bytes

    assert peak(tokens + more) >= peak(tokens)
    small, larger = (job(tokens=t, longest=t) for t in (tokens, tokens + more))
    card = slow_link()
    bounds = Bounds()
    a, b = (least(lean(j, card, homes_of(j)), bounds) for j in (small, larger))
    assert a is not None
    assert b is not None
    assert a[0] <= b[0]


@settings(max_examples=10, deadline=None)
@given(
    gib=st.floats(1.2, 6.0), more=st.floats(0.01, 3.0), config=st.sampled_from([CONFIG, POST_NORMS])
)
def test_more_budget_is_never_slower(gib, more, config):
    small, card = job(config, tokens=8192), slow_link()
    found = list(spaces(small, card, homes_of(small)))
    less, ample = (
        fastest(found, Bounds(device=int(size * GIB), host=8 * GIB)) for size in (gib, gib + more)
    )
    if less is not None:
        assert ample is not None
        assert ample.ms <= less.ms


def test_the_same_request_gives_the_same_plan():
    made = [plan(CONFIG, tokens=8192, lora=16, vram="2GiB", card="RTX 4090") for _ in range(2)]
    assert made[0] == made[1]


def test_the_host_is_used_no_more_than_the_speed_asks_for():
    everything = plan(CONFIG, tokens=2048, lora=16, vram="1000GiB", card="H100")
    assert everything.host_bytes == 0
    assert not any(layer.placements for layer in everything.layers)


@pytest.mark.parametrize("host", [0.01, 0.1, 0.5, 100.0])
@pytest.mark.parametrize("bits", [4, 16])
def test_what_is_called_the_least_memory_fits_and_hardly_less_does(host, bits):
    small, card = job(tokens=30_000, longest=30_000, bits=bits), slow_link()
    found, pinned = list(lean(small, card, homes_of(small))), host * GIB
    lowest = least(found, Bounds(host=pinned))
    assert lowest is not None
    size, made = lowest
    assert made.host <= pinned
    assert made == made.weighed()
    assert fastest(found, Bounds(device=size, host=pinned)) is not None
    assert fastest(found, Bounds(device=0.98 * size, host=pinned)) is None
