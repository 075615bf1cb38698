"""Where tensors are when they are not on the device: activations between the passes, frozen weights between uses."""

from .activations import ActivationStatistics, HostActivationStore, HostTicket
from .host import HostBuffer, pinned_bytes
from .links import Link, link_to
from .weights import StreamedWeights, WeightStatistics

__all__ = [
    "ActivationStatistics",
    "HostActivationStore",
    "HostBuffer",
    "HostTicket",
    "Link",
    "StreamedWeights",
    "WeightStatistics",
    "link_to",
    "pinned_bytes",
]
