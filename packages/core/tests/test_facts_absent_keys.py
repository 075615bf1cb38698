"""A config.json may lack any key: what its class in transformers fills in is what the installed families read."""

import pytest
from hotloop_core import discover, facts_of
from hotloop_core.errors import HotloopError

transformers = pytest.importorskip("transformers")

FAMILIES = {
    model_type: family
    for family in discover().families
    for model_type in sorted(family.model_types)
}
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 5120,
    "num_hidden_layers": 12,
    "num_attention_heads": 64,
    "num_key_value_heads": 16,
    "vocab_size": 1024,
}
NO_MODEL_WITHOUT = SIZES.keys() - {"num_key_value_heads"}
"""Sizes that core refuses to miss."""


def saved(model_type):
    """A config of unusual sizes, as transformers 5 saves it."""
    return transformers.CONFIG_MAPPING[model_type](**SIZES).to_dict()


def saved_earlier(model_type):
    """The same as transformers 4 saved it: the rope's numbers stand among the others."""
    config = saved(model_type)
    rope = config.pop("rope_parameters")
    config |= {k: v for k, v in rope.get("full_attention", rope).items() if k != "rope_type"}
    if model_type == "gemma3_text":
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return config


def filled(model_type, config):
    given = {key: value for key, value in config.items() if key != "model_type"}
    return transformers.CONFIG_MAPPING[model_type](**given).to_dict()


def read(model_type, config):
    """The facts but for the config that they keep, and the layers; or the kind of the refusal."""
    family = FAMILIES[model_type]
    try:
        facts = facts_of(family, config)
    except HotloopError as error:
        return type(error)
    layers = [family.layer_spec(facts.config, index) for index in range(facts.layers)]
    return layers, {name: value for name, value in vars(facts).items() if name != "config"}


@pytest.mark.parametrize("save", [saved, saved_earlier])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_that_lacks_a_key_is_read_as_transformers_reads_it(model_type, save):
    config = save(model_type)
    of_every_model = transformers.PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings"}
    dropped = sorted(config.keys() - of_every_model - NO_MODEL_WITHOUT - {"model_type"})
    assert {"hidden_activation", "hidden_act"} & {*dropped}
    for key in dropped:
        lacking = {name: value for name, value in config.items() if name != key}
        assert read(model_type, lacking) == read(model_type, filled(model_type, lacking)), key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sizes_alone_are_read_as_transformers_reads_them(model_type):
    found = read(model_type, {"model_type": model_type, **SIZES})
    assert not isinstance(found, type)
    assert found == read(model_type, filled(model_type, SIZES))
