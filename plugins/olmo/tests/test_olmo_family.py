from __future__ import annotations

import pytest
from hotloop.exporting import export
from hotloop.loading.gguf_config import gguf_config
from hotloop_core.errors import UnsupportedError
from hotloop_olmo import OLMO2, OLMO3
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL, build, tokenizer
from transformers import Olmo2Config, Olmo3Config

SCALED_WINDOWS = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
}


@pytest.mark.slow
class TestOlmo2(FamilyConformance):
    """No norm before a block, one behind each, and one over all heads of q and of k."""

    spec = OLMO2

    def tiny_config(self):
        return Olmo2Config(**{**SMALL, "num_key_value_heads": 4}, num_hidden_layers=2)


class TestOlmo3(FamilyConformance):
    """Three windowed layers to one that sees everything, whose rotation alone is scaled."""

    spec = OLMO3

    def tiny_config(self):
        full = {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
        }
        rope = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        }
        return Olmo3Config(**SMALL, num_hidden_layers=4, sliding_window=9, rope_parameters=rope)


def test_a_gguf_file_with_windows_is_read_as_olmo_3_and_one_without_as_olmo_2(tmp_path):
    written = TestOlmo3().tiny_config()
    three = export(
        build(written), tokenizer(320), tmp_path, format="gguf", quant="f32", name="three"
    )
    read = gguf_config(three.files[0].path)
    for key in ("model_type", "sliding_window", "layer_types", "rms_norm_eps"):
        assert read[key] == getattr(written, key), key
    for kind, rope in written.rope_parameters.items():
        assert read["rope_parameters"][kind].items() >= rope.items(), kind
    plain = build(TestOlmo2().tiny_config())
    two = export(plain, tokenizer(320), tmp_path, format="gguf", quant="f32", name="two")
    assert gguf_config(two.files[0].path)["model_type"] == "olmo2"


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (Olmo2Config, {"attention_bias": True}, "qkv_bias=True"),
        (Olmo2Config, {"tie_word_embeddings": True}, "tied=True"),
        (Olmo3Config, {"layer_types": ["full_attention", "sliding_attention"]}, "windowed="),
        (Olmo3Config, {"rope_parameters": SCALED_WINDOWS}, "'linear'.*windowed"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_not_written(config, changes, message, tmp_path):
    model = build(config(**SMALL, num_hidden_layers=2, **changes))
    with pytest.raises(UnsupportedError, match=message):
        export(model, tokenizer(320), tmp_path, format="gguf", quant="f32")
