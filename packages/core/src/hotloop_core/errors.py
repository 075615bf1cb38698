"""Every error that a user can meet. A message says what was found, what was expected and what to do next."""

from __future__ import annotations


class HotloopError(Exception):
    """The parent of every error that Hotloop raises on purpose."""


class ConfigError(HotloopError):
    """A model's config, a recipe or an argument has a missing, unknown or contradictory value."""


class UnsupportedError(HotloopError):
    """Something that Hotloop, an op, a backend or a block cannot do, named, with the reason."""


class CheckpointError(HotloopError):
    """A checkpoint is missing, truncated, has missing or surplus tensors, or holds values that are not finite."""


class SecurityError(HotloopError):
    """Refused for safety: pickled data, remote code that was not asked for, a path outside its folder."""


class DataError(HotloopError):
    """A data set is empty, lacks a field, has no trained token or rows that do not fit."""


class PluginError(HotloopError):
    """The parent of what can be wrong with an installed plugin or with finding one."""


class NoFamilyError(PluginError):
    """No installed plugin handles a model type."""


class AmbiguousFamilyError(PluginError):
    """Two plugins claim one model type and the caller did not choose."""


class BrokenPluginError(PluginError):
    """A plugin failed to load; carries its traceback. Raised only by the work that needs that plugin."""


class SpecVersionError(PluginError):
    """A plugin was written for a version of core's types that this core does not accept."""


class NoExporterError(PluginError):
    """No installed plugin writes the format asked for."""


class NoImplementationError(PluginError):
    """No implementation of an op, or no attention backend, can run as asked; lists each with its reason."""


class PlanError(HotloopError):
    """A plan cannot be made or carried out as asked."""


class BudgetError(PlanError):
    """No plan fits the memory budget; names the least that would do."""


class DeviceMemoryError(PlanError):
    """The device ran out of memory: what the plan expected, what was measured, what would fit."""


class WireError(HotloopError):
    """A model cannot be wired as asked: the path in the model, what was found and why it is refused."""


class UnwireError(HotloopError):
    """A wiring cannot be undone because something changed after it."""


class GradientError(HotloopError):
    """Gradients are missing, all zero or not finite, with the parameters that show it."""


class ExportError(HotloopError):
    """An export cannot be made or finished; nothing that looks whole was left behind."""


class OutputExistsError(ExportError):
    """The output already exists and was not to be overwritten."""
