"""The weights that `load` reads itself are those that transformers would have made of the same files, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import threading
import weakref

import pytest
import torch
from hotloop.loading import load, load_report
from hotloop.loading.quantize import nf4_config
from hotloop.loading.stored import safetensors_index
from hotloop_core.errors import CheckpointError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 304,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (Gemma2Config, {}),
    "gemma3": (Gemma3TextConfig, {}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_tokenizer):
    """Family name -> folder, made at first use: bf16, in shards of 100 KB."""
    made = {}

    def get(name):
        if name not in made:
            kind, extra = FAMILIES[name]
            torch.manual_seed(3)
            config = kind(**SIZES, **extra)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            made[name] = tmp_path_factory.mktemp("families") / name
            model.save_pretrained(made[name], max_shard_size="100KB")
            tiny_tokenizer.save_pretrained(made[name])
        return made[name]

    return get


def ours(path, **options):
    options = {"bits": 16, "max_seq_len": 64, "wire": False, "device": "cpu", **options}
    return load(path, **options)[0]


def theirs(path, dtype, bits):
    options = {"quantization_config": nf4_config(dtype)} if bits == 4 else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    model.config.use_cache = False
    return model


def assert_same_tensors(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "bits, dtype", [(16, torch.float32), (16, torch.bfloat16), (4, torch.bfloat16)]
)
def test_every_tensor_is_bitwise_what_transformers_loads(checkpoints, name, bits, dtype):
    path = checkpoints(name)
    model, expected = ours(path, bits=bits, dtype=dtype), theirs(path, dtype, bits)
    report = load_report(model)
    assert (report.reader, report.reason) == ("hotloop", None)
    assert_same_tensors(model.state_dict(), expected.state_dict())
    assert_same_tensors(dict(model.named_buffers()), dict(expected.named_buffers()))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("bits", [4, 16])
def test_the_model_has_what_transformers_leaves_on_one(checkpoints, name, bits, tmp_path):
    path = checkpoints(name)
    model, expected = (
        ours(path, bits=bits, dtype=torch.bfloat16),
        theirs(path, torch.bfloat16, bits),
    )
    mine, other = model.config.to_dict(), expected.config.to_dict()
    assert {k: v for k, v in mine.items() if k != "_name_or_path"} == {
        k: v for k, v in other.items() if k != "_name_or_path"
    }
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert type(model) is type(expected)
    assert not model.training and model.device == expected.device
    for flag in ("is_quantized", "is_loaded_in_4bit", "quantization_method", "hf_device_map"):
        assert getattr(model, flag, None) == getattr(expected, flag, None), flag
    assert type(getattr(model, "hf_quantizer", None)) is type(
        getattr(expected, "hf_quantizer", None)
    )
    assert model._no_split_modules == expected._no_split_modules
    assert model._weight_conversions == expected._weight_conversions
    for (path_a, a), (path_b, b) in zip(
        model.named_modules(), expected.named_modules(), strict=True
    ):
        assert (path_a, type(a)) == (path_b, type(b))
    model.save_pretrained(tmp_path / "ours")
    expected.save_pretrained(tmp_path / "theirs")
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        assert_same_tensors(load_file(tmp_path / "ours" / file.name), load_file(file))


def test_a_four_bit_checkpoint_is_read_straight_too(checkpoints, tmp_path, tiny_tokenizer):
    first = ours(checkpoints("qwen2"), bits=4, dtype=torch.bfloat16)
    first.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = ours(tmp_path, bits=4, dtype=torch.bfloat16)
    assert load_report(model).reader == "hotloop"
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_tensors(model.state_dict(), expected.state_dict())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.quant_state is model.model.layers[0].mlp.up_proj.quant_state
    assert (weight.quant_type, weight.blocksize, weight.bnb_quantized) == ("nf4", 64, True)


def test_training_steps_equal_those_of_a_model_that_transformers_loaded(checkpoints):
    from hotloop.loading.quantize import settle_
    from hotloop.lora import add_lora

    path = checkpoints("llama")
    expected = theirs(path, torch.float32, 4)
    settle_(expected, torch.float32)
    expected.requires_grad_(False)
    losses = []
    ids = torch.randint(0, 300, (2, 12))
    for model in (ours(path, bits=4, dtype=torch.float32), expected):
        adapted = add_lora(model, r=4)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            loss = adapted(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[:3] == losses[3:] and losses[0] != losses[2]


def test_exports_equal_those_of_a_model_that_transformers_loaded(checkpoints, tmp_path):
    from hotloop.exporting import export

    path = checkpoints("gemma2")
    for name, model in (
        ("ours", ours(path, bits=4, dtype=torch.bfloat16)),
        ("theirs", theirs(path, torch.bfloat16, 4)),
    ):
        export(model, None, tmp_path / name, format="safetensors")
    files = sorted(p.name for p in (tmp_path / "theirs").glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


@pytest.fixture
def changed(checkpoints, tmp_path):
    """A copy of the Llama in one file, with its tensors changed."""

    def make(change):
        copied = tmp_path / "changed"
        shutil.copytree(checkpoints("llama"), copied)
        tensors = {}
        for file in sorted(copied.glob("*.safetensors")):
            tensors.update(load_file(file))
            file.unlink()
        (copied / "model.safetensors.index.json").unlink()
        change(tensors)
        save_file(tensors, copied / "model.safetensors", {"format": "pt"})
        return copied

    return make


def test_names_of_an_older_layout_go_through_transformers_and_the_report_says_so(changed):
    def without_prefix(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    model = ours(changed(without_prefix), dtype=torch.bfloat16)
    report = load_report(model)
    assert report.reader == "transformers"
    assert "embed_tokens.weight" in report.reason and "LlamaForCausalLM" in str(report)


def test_a_head_stored_beside_the_embedding_that_it_is_tied_to_goes_through_transformers(changed):
    def both(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    path = changed(both)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = ours(path, dtype=torch.bfloat16)
    assert "lm_head.weight" in load_report(model).reason
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tensor_that_is_in_two_files_is_refused(changed):
    path = changed(lambda tensors: None)
    shutil.copy(path / "model.safetensors", path / "again.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "again.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="and in another file of"):
        ours(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(changed):
    path = changed(lambda tensors: None)
    file = path / "model.safetensors"
    stored = safetensors_index([file])
    file.write_bytes(file.read_bytes()[:-10])
    last = max(stored.values(), key=lambda s: s.span.start)
    with pytest.raises(CheckpointError, match="in the middle of a tensor"):
        last.load()


def test_stored_tensors_of_every_shape_are_read_as_safetensors_reads_them(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "numbers": torch.arange(6).view(2, 3),
        "half": torch.randn(3, 5).to(torch.bfloat16),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = safetensors_index([tmp_path / "a.safetensors"])
    for name, tensor in tensors.items():
        value = found[name].load()
        assert value.dtype == tensor.dtype and value.shape == tensor.shape
        assert torch.equal(value, tensor)


@pytest.mark.parametrize("bits", [4, 16])
def test_no_tensor_is_asked_for_before_the_last_one_is_gone_or_in_its_home(
    checkpoints, monkeypatch, bits
):
    from hotloop.homes import Homes
    from hotloop.loading import assemble
    from hotloop_core import LayerPlan, Plan

    events = []

    class Watched:
        """As `uploaded`; remembers the tensor that it gave last without holding it."""

        def __init__(self, stored, device):
            self.left, self.last = iter(stored), None

        def __next__(self):
            if self.last is not None and "_proj.weight" in self.last[0] and bits == 4:
                assert self.last[1]() is None, f"{self.last[0]} is still held as it was stored"
            tensor = next(self.left)
            events.append(tensor.name)
            value = tensor.load()
            self.last = (tensor.name, weakref.ref(value))
            return value

        def close(self):
            assert next(self.left, None) is None

    house = Homes.house_layer
    monkeypatch.setattr(assemble, "uploaded", Watched)
    monkeypatch.setattr(
        Homes, "house_layer", lambda self, i: (events.append(f"house {i}"), house(self, i))
    )
    plan = Plan(
        layers=tuple(LayerPlan(streamed=i < 2) for i in range(3)),
        tokens=64,
        longest=64,
        embedding_on_host=True,
        head_on_host=True,
    )
    model = ours(checkpoints("llama"), bits=bits, dtype=torch.bfloat16, plan=plan)
    assert "model.embed_tokens.weight" not in events and "lm_head.weight" not in events
    for layer in range(2):
        last = max(i for i, name in enumerate(events) if f"layers.{layer}." in name)
        assert events[last + 1] == f"house {layer}"
    expected = theirs(checkpoints("llama"), torch.bfloat16, bits)
    assert_same_tensors(model.state_dict(), expected.state_dict())


def test_the_config_that_was_read_is_not_changed_by_loading(checkpoints):
    from hotloop.loading.assemble import Skeleton
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoints("llama"))
    before = copy.deepcopy(config.to_dict())
    Skeleton(config, torch.bfloat16, attn=None, device=torch.device("cpu"), quantise=True)
    assert config.to_dict() == before


def test_tensors_larger_than_a_chunk_and_smaller_arrive_whole_and_in_order(tmp_path, monkeypatch):
    from hotloop.loading import upload

    monkeypatch.setattr(upload, "CHUNK_BYTES", 256)
    monkeypatch.setattr(upload, "CHUNKS", 3)
    sizes = [0, 1, 63, 64, 65, 700, 0, 2000, 5]
    tensors = {f"t{i}": torch.randn(size) for i, size in enumerate(sizes)}
    tensors["made"] = torch.randn(7)
    save_file(tensors, tmp_path / "a.safetensors")
    found = safetensors_index([tmp_path / "a.safetensors"])
    found["made"] = dataclasses.replace(
        found["made"], span=None, make=lambda: tensors["made"].clone()
    )
    order = ["t7", "made", *sorted(set(tensors) - {"t7", "made"})]
    arrived = list(upload.uploaded([found[n] for n in order], torch.device("cpu")))
    for name, value in zip(order, arrived, strict=True):
        assert torch.equal(value, tensors[name]), name


def test_a_chunk_is_not_read_into_before_its_copy_to_the_device_is_done(tmp_path, monkeypatch):
    import hotloop_engine.stores as stores
    from hotloop.loading import upload
    from hotloop_engine.stores.links import HostLink

    class Late:
        """A stream whose copies happen when somebody waits for them."""

        def __init__(self):
            self.queue, self.lock = [], threading.Lock()

        def record_event(self):
            return self

        def synchronize(self):
            with self.lock:
                for target, source in self.queue:
                    target.copy_(source)
                self.queue.clear()

    class LateLink(HostLink):
        late = Late()

        def current(self):
            return self.late

        def copy(self, target, source, stream):
            with stream.lock:
                stream.queue.append((target, source))

    monkeypatch.setattr(stores, "link_to", lambda device: LateLink())
    monkeypatch.setattr(upload, "CHUNK_BYTES", 256)
    monkeypatch.setattr(upload, "CHUNKS", 2)
    tensors = {"a": torch.randn(3000)}
    save_file(tensors, tmp_path / "a.safetensors")
    stored = safetensors_index([tmp_path / "a.safetensors"])
    (arrived,) = upload.uploaded([stored["a"]], torch.device("cpu"))
    LateLink.late.synchronize()
    assert torch.equal(arrived, tensors["a"])


def test_an_error_in_a_reading_thread_reaches_the_caller(tmp_path):
    from hotloop.loading.upload import uploaded

    save_file({"a": torch.randn(100)}, tmp_path / "a.safetensors")
    stored = safetensors_index([tmp_path / "a.safetensors"])
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="in the middle of a tensor"):
        list(uploaded(list(stored.values()), torch.device("cpu")))
