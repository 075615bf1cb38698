from __future__ import annotations

import pytest
from hotloop_core import facts_of
from hotloop_core.errors import UnsupportedError
from hotloop_stablelm import STABLELM
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL
from transformers import StableLmConfig

SIZES = {**SMALL, "num_hidden_layers": 2}


class TestStableLm(FamilyConformance):
    """3B: LayerNorm with a bias, four of sixteen dimensions rotated."""

    spec = STABLELM

    def tiny_config(self):
        return StableLmConfig(**{**SIZES, "num_key_value_heads": 4})


@pytest.mark.slow
class TestStableLm2(FamilyConformance):
    """2 1.6B: biases on q, k and v; fewer key/value heads."""

    spec = STABLELM

    def tiny_config(self):
        return StableLmConfig(**SIZES, use_qkv_bias=True)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"use_parallel_residual": True}, "beside each other"),
        ({"qk_layernorm": True}, "LayerNorm of its own"),
        ({"hidden_dropout": 0.1}, "dropped out"),
    ],
)
def test_what_the_description_does_not_say_is_refused(changes, reason):
    with pytest.raises(UnsupportedError, match=reason):
        facts_of(STABLELM, StableLmConfig(**SIZES, **changes).to_dict())
