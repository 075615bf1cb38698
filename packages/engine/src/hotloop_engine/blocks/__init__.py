"""The two halves of a decoder layer, each with a written-out backward, and the autograd function that runs them."""

from .attend import Attend, AttentionShape
from .attention import AttentionBlock
from .context import BlockContext, NormView, Saved
from .graphs import can_record
from .mlp import MlpBlock
from .own import Call, OwnBlock
from .recorded import Kind, run_recorded
from .recorder import Recorder
from .run import Run, StreamBlock, Surroundings, run_blocks

__all__ = [
    "Attend",
    "AttentionBlock",
    "AttentionShape",
    "BlockContext",
    "Call",
    "Kind",
    "MlpBlock",
    "NormView",
    "OwnBlock",
    "Recorder",
    "Run",
    "Saved",
    "StreamBlock",
    "Surroundings",
    "can_record",
    "run_blocks",
    "run_recorded",
]
