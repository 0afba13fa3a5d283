"""What only a step of an optimizer changes: the memory that may be copied while forward and backward run."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardckpt.state import names
from shardckpt.state.distributed import is_dtensor
from shardckpt.state.leaves import is_distributed, is_meta, local_parts
from shardckpt.state.skeleton import MAX_DEPTH


class Stepped:
    """The memory of the parameters of the optimizers in a state, and of those optimizers' own tensors.

    Left out is what something else than a step writes to, as far as that can be known: what forward renormalises
    (``nn.Embedding(max_norm=...)``), and whatever belongs to an optimizer whose ``step`` runs no hooks, since it does
    without torch's constructor. Views with gaps are left out too: the gaps may be anybody's.
    """

    def __init__(self, state: Any) -> None:
        self._ends: dict[torch.device, dict[int, int]] = {}
        self._live: dict[tuple[torch.device, int], list[Tensor]] = {}
        written = {id(weight) for _, module in names.iter_modules(state) for weight in _written_by_forward(module)}
        with torch.no_grad():
            for optimizer in _optimizers(state):
                parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
                for live in _tensors([[p for p in parameters if id(p) not in written], dict(optimizer.state)]):
                    for part in local_parts(live) if is_distributed(live) else [live]:
                        self._add(part, live)
        self._starts = {device: sorted(ends) for device, ends in self._ends.items()}

    def holds(self, tensor: Tensor) -> bool:
        """Whether all of ``tensor`` lies in that memory, and its version counter would show a change."""
        starts = self._starts.get(tensor.device)
        if not starts or not tensor.numel() or tensor.is_inference():
            return False
        begin = tensor.data_ptr()
        at = bisect_right(starts, begin) - 1
        return at >= 0 and begin + _span(tensor) <= self._ends[tensor.device][starts[at]]

    def live(self, tensor: Tensor) -> list[Tensor]:
        """The tensors whose version counters show a change of a ``tensor`` that is held, itself among them.

        A DTensor counts what is done to it, its local part what is done to that, and what is detached from a DTensor,
        like the values of ``state_dict``, has a local part that counts anew (tried with torch 2.13).
        """
        starts = self._starts[tensor.device]
        start = starts[bisect_right(starts, tensor.data_ptr()) - 1]
        return [tensor, *(live for live in self._live[tensor.device, start] if not live.is_inference())]

    def _add(self, tensor: Tensor, live: Tensor) -> None:
        if tensor.layout is not torch.strided or is_meta(tensor) or _span(tensor) != tensor.nbytes:
            return
        ends, begin = self._ends.setdefault(tensor.device, {}), tensor.data_ptr()
        ends[begin] = max(ends.get(begin, 0), begin + tensor.nbytes)
        self._live.setdefault((tensor.device, begin), []).extend([tensor, live] if is_dtensor(live) else [tensor])


def _span(tensor: Tensor) -> int:
    """Bytes from the first to behind the last element in memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _written_by_forward(module: nn.Module) -> Iterator[Tensor]:
    for child in module.modules():
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.max_norm is not None:
            yield child.weight


def _optimizers(state: Any, depth: int = 0) -> Iterator[Optimizer]:
    """The optimizers in a state whose ``step`` runs hooks, as every class does of which torch made an instance."""
    if depth > MAX_DEPTH:  # flattening says what is wrong
        return
    if names.is_optimizer(state):
        step: Any = type(names.optimizer_of(state)).step
        if step is not Optimizer.step and getattr(step, "hooked", False):
            yield names.optimizer_of(state)
    elif isinstance(state, dict):
        for value in state.values():
            yield from _optimizers(value, depth + 1)
    elif type(state) in (list, tuple):
        for value in state:
            yield from _optimizers(value, depth + 1)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    if is_distributed(value) or isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
