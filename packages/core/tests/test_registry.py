import sys
import types
from dataclasses import replace

import pytest
from hotloop_core import (
    API,
    Attention,
    ExporterSpec,
    FamilySpec,
    Glu,
    LayerSpec,
    Norms,
    discover,
    hookimpl,
)
from hotloop_core.errors import (
    AmbiguousFamilyError,
    BrokenPluginError,
    ConfigError,
    NoExporterError,
    NoFamilyError,
    PluginError,
    SpecVersionError,
)
from hotloop_core.registry import collect

FAMILY = FamilySpec(
    api=API,
    name="made-up",
    model_types=frozenset({"made_up"}),
    layer=LayerSpec(
        norms=Norms(before_attention="n1", before_mlp="n2"),
        attention=Attention(q="q", k="k", v="v", o="o"),
        mlp=Glu(gate="g", up="u", down="d"),
    ),
)
EXPORTER = ExporterSpec(api=API, name="npz", target="a:b", summary="arrays", quants={"f32": "all"})


class Point:
    """An entry point that gives an object, or raises."""

    def __init__(self, name, plugin):
        self.name, self.plugin = name, plugin
        self.dist = types.SimpleNamespace(name=f"hotloop-{name}", version="1.2")

    def load(self):
        if isinstance(self.plugin, BaseException):
            raise self.plugin
        return self.plugin


def plugin(families=(), exporters=()):
    class Plugin:
        @hookimpl
        def hotloop_families(self):
            return list(families)

        @hookimpl
        def hotloop_exporters(self):
            return list(exporters)

    return Plugin()


def found(*points, **options):
    return discover(entry_points=lambda: points, **options)


def test_a_family_is_matched_by_its_model_type():
    registry = found(Point("a", plugin([FAMILY])))
    assert registry.match({"model_type": "made_up"}) is FAMILY
    assert registry.plugins[0].version == "1.2"


def test_an_unknown_model_type_says_what_is_installed_and_what_to_install():
    registry = found(Point("a", plugin([FAMILY])))
    with pytest.raises(NoFamilyError, match="Installed: made-up") as caught:
        registry.match({"model_type": "gemma2"})
    assert "uv add hotloop-gemma" in str(caught.value)
    with pytest.raises(NoFamilyError, match=r"docs/write-a-family\.md"):
        registry.match({"model_type": "phi4"})
    with pytest.raises(ConfigError, match="model_type=None"):
        registry.match({})


def test_two_plugins_for_one_model_type_need_a_choice():
    other = replace(FAMILY, name="other")
    points = (Point("a", plugin([FAMILY])), Point("b", plugin([other])))
    config = {"model_type": "made_up"}
    with pytest.raises(AmbiguousFamilyError, match=r"'made-up'.*'other'"):
        found(*points).match(config)
    assert found(*points).match(config, family="other") is other
    assert found(*points, block=["a"]).match(config) is other
    with pytest.raises(NoFamilyError, match="'third'"):
        found(*points).match(config, family="third")


def test_a_blocked_plugin_is_listed_but_not_loaded():
    registry = found(Point("a", RuntimeError("loaded")), block=["a"])
    assert registry.plugins[0].blocked
    assert registry.plugins[0].problem is None
    with pytest.raises(PluginError, match="installed plugins are a"):
        found(Point("a", plugin()), block=["b"])


def test_a_broken_plugin_is_listed_with_its_traceback_and_only_fails_its_own_work():
    registry = found(Point("a", ImportError("no such thing")), Point("b", plugin([FAMILY])))
    broken = registry.plugins[0]
    assert broken.problem == "ImportError: no such thing"
    assert "Traceback" in broken.trace
    assert registry.match({"model_type": "made_up"}) is FAMILY
    with pytest.raises(NoFamilyError, match=r"'a' .* is broken: ImportError"):
        registry.match({"model_type": "phi4"})
    with pytest.raises(BrokenPluginError, match="no such thing"):
        registry.exporter("a")


def test_an_exporter_is_found_by_its_format():
    registry = found(Point("a", plugin(exporters=[EXPORTER])))
    assert registry.exporter("npz") is EXPORTER
    with pytest.raises(NoExporterError, match="Installed formats: npz"):
        registry.exporter("onnx")
    twice = found(
        Point("a", plugin(exporters=[EXPORTER])), Point("b", plugin(exporters=[EXPORTER]))
    )
    with pytest.raises(NoExporterError, match=r"hotloop-a 1\.2, hotloop-b 1\.2"):
        twice.exporter("npz")


@pytest.mark.parametrize("api, upgrade", [(API + 1, "hotloop-core"), (API - 5, "hotloop-old")])
def test_a_spec_of_another_version_names_what_to_upgrade(api, upgrade):
    old = plugin([replace(FAMILY, api=api)])
    with pytest.raises(SpecVersionError, match=upgrade):
        collect(old, name="old", distribution="hotloop-old")


def test_a_misspelt_hook_is_told_with_the_right_name():
    class Misspelt:
        @hookimpl
        def hotloop_familys(self):
            return [FAMILY]

    with pytest.raises(PluginError, match="did you mean 'hotloop_families'"):
        collect(Misspelt(), name="a")


def test_a_hook_without_its_mark_and_a_plugin_without_hooks_are_told():
    class Unmarked:
        def hotloop_families(self):
            return [FAMILY]

    with pytest.raises(PluginError, match="@hookimpl"):
        collect(Unmarked(), name="a")
    with pytest.raises(PluginError, match="implements no hook"):
        collect(types.SimpleNamespace(), name="a")


def test_a_plugin_that_exits_at_import_is_broken_like_any_other():
    assert found(Point("a", SystemExit(3))).plugins[0].problem == "SystemExit: 3"


def test_two_families_of_one_name_are_told_apart_by_blocking_alone():
    points = (Point("a", plugin([FAMILY])), Point("b", plugin([FAMILY])))
    with pytest.raises(AmbiguousFamilyError, match=r"Block one of the plugins") as caught:
        found(*points).match({"model_type": "made_up"})
    assert "family=NAME" not in str(caught.value)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"api": "1"}, "api is '1', expected"),
        ({"model_types": "made_up"}, "expected a frozenset of names"),
    ],
)
def test_a_field_of_the_wrong_kind_is_told(changed, says):
    with pytest.raises(PluginError, match=says):
        collect(plugin([replace(FAMILY, **changed)]), name="a")


def test_a_hook_with_an_argument_is_told():
    class Curious:
        @hookimpl
        def hotloop_families(self, registry):
            return [FAMILY]

    with pytest.raises(PluginError, match="a hook takes no argument"):
        collect(Curious(), name="a")


@pytest.mark.parametrize(
    "answer, says", [((FAMILY,), "tuple"), ([EXPORTER], "ExporterSpec"), (None, "None")]
)
def test_a_hook_that_returns_something_else_is_told(answer, says):
    class Wrong:
        @hookimpl
        def hotloop_families(self):
            return answer

    with pytest.raises(PluginError, match=f"{says}, expected"):
        collect(Wrong(), name="a")


def test_discovering_what_is_installed_loads_neither_torch_nor_transformers():
    import subprocess

    code = (
        "import sys, hotloop_core; r = hotloop_core.discover();"
        "print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules],"
        " all(p.problem is None for p in r.plugins))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"
