"""Cards by name and by their numbers, host memory, and amounts of memory as people write them."""

import pytest
from hotloop.planner import find_card, parse_bytes, plan
from hotloop.planner.host import assumed_host_memory, free_host_memory
from hotloop_core.errors import ConfigError

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "hidden_act": "silu",
}


def h100(**options):
    return plan(LLAMA_8B, tokens=4096, longest=2048, lora=16, card="H100", **options)


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GiB", 24 * GIB),
        ("24 G", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("1.5TiB", 1536 * GIB),
        ("512mib", 2**29),
        (1000, 1000),
        ("25769803776", 24 * GIB),
    ],
)
def test_amounts_of_memory_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["24", "0", "0GiB", "-3GiB", "24 GiBs", "1e9", "", True, None, 1.5, 2**70, "9" * 400 + "GiB"],
)
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ConfigError, match="not an amount of memory; expected such as '24GiB'"):
        parse_bytes(text)


def test_no_host_memory_at_all_may_be_asked_for():
    for host in (0, "0", "0GiB"):
        assert h100(vram="12GiB", host=host).host_bytes == 0
    assert h100(vram="12GiB").host_bytes > 0


@pytest.mark.parametrize(
    "name, card",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("A100 80 GB", "A100 80GB"),
        ("NVIDIA A10", "A10"),
        ("Tesla T4", "T4"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
    ],
)
def test_cards_are_found_by_the_names_that_drivers_and_people_use(name, card):
    assert find_card(name).name == card


def test_a_card_may_be_given_by_its_numbers():
    card = find_card("24GiB, 165TFLOP/s, 1008GB/s, 25GB/s")
    known = find_card("RTX 4090")
    assert (card.gemm_tflops, card.copy_gbs) == (known.gemm_tflops, known.copy_gbs)
    assert card.link_gbs == 25
    assert 23 * GIB < card.memory < 24 * GIB
    assert find_card("24GiB,165TFLOPS,1008GB/s,25GB/s") == card
    with pytest.raises(ConfigError, match="CUDA context"):
        find_card("0.5GB,1TFLOP/s,1GB/s,1GB/s")
    with pytest.raises(ConfigError, match="24GiB,165TFLOP/s"):
        find_card("24GiB,fast")


def test_a_card_without_bf16_says_so():
    assert "has no bf16 in hardware" in str(plan(LLAMA_8B, tokens=512, lora=8, card="T4"))


def test_a_container_grants_no_more_host_memory_than_its_limit(tmp_path):
    free = free_host_memory(tmp_path)  # no such files: what is free
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert free_host_memory(tmp_path) == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_host_memory(tmp_path) == 100
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    assert free_host_memory(tmp_path) == 400


def test_a_host_that_is_not_there_is_assumed_and_said():
    assert assumed_host_memory(24 * GIB) == 64 * GIB
    assert assumed_host_memory(80 * GIB) == 160 * GIB
    assert "a host that can pin" in str(h100(vram="4GiB"))
    assert "a host that can pin" not in str(h100(vram="4GiB", host="64GiB"))


@pytest.mark.parametrize(
    "name",
    [
        "A100",
        "A10G",
        "GTX 1080",
        "",
        "RTX 4090 Laptop GPU",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "RTX 3090 Ti",
    ],
)
def test_a_card_that_is_not_one_is_refused_with_the_names(name):
    with pytest.raises(ConfigError, match="A100 40GB"):
        find_card(name)
