"""Tensors to files, overlapped: one thread reads and merges, this one encodes, a third hashes and writes."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from hotloop_core.files import Behind, ahead

from .encoders import encode
from .writer import GgufWriter, TensorInfo, data_bytes, header, split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from hotloop_core.files import Outputs
    from torch import Tensor

    from .writer import Block, Value

ELEMENTS = 1 << 23
"""About the most elements in one block of rows: 32 MiB in float32, some of which are under way at once. That keeps a
GPU busy, and an 8B model's widest matrix passes in 8 of them."""


class Encoder(Protocol):
    """Rows of a tensor to a storage type's bytes; `hotloop_gguf.encoders.encode` is one."""

    def __call__(
        self, tensor: Tensor, block: Block, name: str, importance: Tensor | None
    ) -> Iterable[memoryview]:
        """tensor: [..., K], any float dtype. name: for errors. importance: float32 [K], or None. In parts, in order."""
        ...


@dataclass(frozen=True)
class Planned:
    """A tensor of the files: its storage type in each of the outputs, and how to get it.

    source: its name in the model. parts: at most so many elements at once -> blocks of rows, each with its first row.
    importance: weights of its columns, [columns], or of each expert's, [experts, columns]; None where not measured.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    parts: Callable[[int], Iterator[tuple[int, Tensor]]]
    importance: Tensor | None = None

    def info(self, output: int) -> TensorInfo:
        """Its place in output number `output`."""
        return TensorInfo(self.name, self.shape, self.blocks[output])


@dataclass(frozen=True)
class Output:
    """One model's files: the first bears all metadata; further ones only where it is split."""

    files: dict[str, tuple[dict[str, Value], list[TensorInfo]]]

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return sum(len(header(*file)) + data_bytes(file[1]) for file in self.files.values())


def plan_output(
    stem: str,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorInfo],
    max_bytes: int | None,
) -> Output:
    """The file `stem`.gguf, or `stem`-00001-of-0000N.gguf and so on."""
    files = split(metadata, tensors, max_bytes)
    if len(files) == 1:
        return Output({f"{stem}.gguf": files[0]})
    return Output(
        {f"{stem}-{i:05}-of-{len(files):05}.gguf": file for i, file in enumerate(files, 1)}
    )


def write_outputs(
    outputs: Outputs,
    planned: Sequence[Output],
    tensors: Sequence[Planned],
    progress: Callable[[int, int, str], None] | None,
    encoder: Encoder = encode,
) -> None:
    """Writes every output in one pass over the tensors."""
    with ExitStack() as opened:
        routes = [_open(opened, outputs, output) for output in planned]
        done = 0
        with (
            Behind[partial[None]](lambda write: write(), depth=1) as later,
            closing(ahead(_blocks(tensors))) as blocks,
        ):
            for tensor, start, block in blocks:
                for route, kind in zip(routes, tensor.blocks, strict=True):
                    for data in _encoded(encoder, tensor, kind, start, block):
                        later.put(partial(route[tensor.name].write, tensor.name, data))
                if start + block.shape[0] < tensor.shape[0]:
                    continue
                done += 1
                if progress is not None:
                    progress(done, len(tensors), tensor.source)
        for route in routes:
            for writer in dict.fromkeys(route.values()):
                writer.finish()


def _open(opened: ExitStack, outputs: Outputs, output: Output) -> dict[str, GgufWriter]:
    """The writer of each tensor. Readers begin with the first file, so that one is named last."""
    route: dict[str, GgufWriter] = {}
    for name, (metadata, tensors) in reversed(output.files.items()):
        writer = GgufWriter(opened.enter_context(outputs.open(name)), metadata, tensors)
        route |= {tensor.name: writer for tensor in tensors}
    return route


def _blocks(tensors: Sequence[Planned]) -> Iterator[tuple[Planned, int, Tensor]]:
    for tensor in tensors:
        # Experts have weights of their own, so they come one at a time.
        each = tensor.importance is not None and tensor.importance.ndim == 2
        for start, block in tensor.parts(1 if each else ELEMENTS):
            yield tensor, start, block


def _encoded(
    encoder: Encoder, tensor: Planned, kind: Block, start: int, block: Tensor
) -> Iterable[memoryview]:
    weights = tensor.importance
    if weights is None or kind.values == 1:
        return encoder(block, kind, tensor.source, None)
    own = weights[start] if weights.ndim == 2 else weights
    return encoder(block, kind, tensor.source, own.to(block.device))
