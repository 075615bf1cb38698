"""The two halves of a decoder layer, each with a written-out backward, and the autograd function that runs them."""

from .attend import Attend, AttentionShape
from .attention import AttentionBlock
from .context import BlockContext, NormView, Saved
from .mlp import MlpBlock
from .own import Call, OwnBlock
from .run import Run, StreamBlock, Surroundings, run_blocks

__all__ = [
    "Attend",
    "AttentionBlock",
    "AttentionShape",
    "BlockContext",
    "Call",
    "MlpBlock",
    "NormView",
    "OwnBlock",
    "Run",
    "Saved",
    "StreamBlock",
    "Surroundings",
    "run_blocks",
]
