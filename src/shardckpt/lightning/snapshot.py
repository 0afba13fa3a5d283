"""From the dict that Lightning wants saved to the state that the engine takes: who holds what, and what changed since.

Under DDP every rank has the same dict. Its model and optimizer states are replicated, so they become `ModuleState` and
`OptimizerState` and each rank writes a part of them. Everything else is rank 0's word alone, as it is in stock
Lightning, but for what a hook marked with `PerRank`: a callback's tensors may well have another shape on another rank.
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Final

import torch
import xxhash
from torch import Tensor, nn

from shardckpt.lightning.lazy import plain
from shardckpt.state import ModuleState, OptimizerState, PerRank, Share
from shardckpt.state.skeleton import MAX_DEPTH
from shardckpt.state.values import is_plain_dict

MODEL: Final = "state_dict"
OPTIMIZERS: Final = "optimizer_states"

_WHOLE_BYTES: Final = 4096
"""Up to this size a tensor in host memory is fingerprinted by its contents."""
_SAMPLES: Final = 16
"""Elements that are looked at in a larger one."""


class Produced:
    """The state dicts that a strategy made for the checkpoint that is being put together.

    A hook may replace them or change them in place. What is still as it was made stands for the live model and its
    optimizers, and may be written by all ranks together.
    """

    def __init__(self) -> None:
        self._module: tuple[nn.Module, Mapping[str, Any]] | None = None
        self._optimizers: list[tuple[torch.optim.Optimizer, Mapping[str, Any]]] = []

    def module(self, module: nn.Module, state_dict: Mapping[str, Any]) -> None:
        """Note the model's state dict: the first thing that Lightning asks for, so older notes are void."""
        self._module = (module, state_dict)
        self._optimizers = []

    def optimizer(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._optimizers.append((optimizer, state_dict))

    def forget(self) -> None:
        self._module = None
        self._optimizers = []

    def module_state(self, value: Any) -> ModuleState | None:
        """``value`` as the model's state, if it is what the strategy made and still shows the live parameters."""
        if self._module is None or self._module[1] is not value:
            return None
        module, state_dict = self._module
        live = dict(module.named_parameters(remove_duplicate=False))
        if all(_shows(state_dict[name], parameter) for name, parameter in live.items() if name in state_dict):
            return ModuleState(module, state_dict)
        return None

    def optimizer_state(self, value: Any) -> OptimizerState | None:
        """``value`` as an optimizer's state, if it is what the strategy made, with equal contents on every rank."""
        for optimizer, state_dict in self._optimizers:
            if state_dict is value and self._module is not None and not hasattr(optimizer, "consolidate_state_dict"):
                return OptimizerState(optimizer, state_dict, {MODEL: self._module[0]})
        return None


def _shows(value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.dtype != parameter.dtype:
        return False
    try:
        return value.data_ptr() == parameter.data_ptr()
    except RuntimeError:  # a tensor without storage, a functional or fake one, cannot be said to be another
        return False


Layout = dict[str, list[int] | None]
"""The keys of a checkpoint that hold live states: None for a model's, else the indices within a list of optimizers'."""


def split_off(checkpoint: Mapping[str, Any], produced: Produced) -> dict[str, Any]:
    """``checkpoint`` with the model's and optimizers' states marked as what they are."""
    state: dict[str, Any] = {}
    for key, value in checkpoint.items():
        if key == OPTIMIZERS and isinstance(value, list):
            state[key] = [produced.optimizer_state(item) or plain(item) for item in value]
        else:
            state[key] = produced.module_state(value) or plain(value)
    return state


def layout_of(state: Mapping[str, Any]) -> Layout:
    """Where the live states are in what `split_off` returned."""
    layout: Layout = {}
    for key, value in state.items():
        if isinstance(value, ModuleState):
            layout[key] = None
        elif isinstance(value, list) and (
            found := [i for i, item in enumerate(value) if isinstance(item, OptimizerState)]
        ):
            layout[key] = found
    return layout


def share_of(state: Mapping[str, Any], layout: Layout, *, with_buffers: bool) -> Share:
    """What a rank other than 0 contributes: the replicated tensors of the live states, where rank 0 has them too.

    Buffers come from rank 0, unless the user declared them equal on all ranks (``with_buffers``). And whatever is
    marked with `PerRank`, wherever it is.
    """
    share = Share()
    for key, indices in layout.items():
        value = state.get(key)
        if indices is None and isinstance(value, ModuleState):
            kept = {name for name, _ in value.module.named_parameters(remove_duplicate=False)}
            if with_buffers:
                kept |= {name for name, _ in value.module.named_buffers(remove_duplicate=False)}
            kept |= {name for name, item in value.state_dict.items() if isinstance(item, PerRank)}
            share[key] = value._replace(state_dict={k: v for k, v in value.state_dict.items() if k in kept})
        elif indices is not None and isinstance(value, list):
            share[key] = [
                item if index in indices and isinstance(item, OptimizerState) else None
                for index, item in enumerate(value)
            ]
    for key, value in state.items():
        if key not in layout and (own := _own_values(value)) is not None:
            share[key] = own
    return share


def _own_values(value: Any, depth: int = 0) -> Any:
    """The containers of ``value`` with nothing but each `PerRank` in them; None where there is none."""
    if isinstance(value, PerRank):
        return value
    if depth > MAX_DEPTH:  # rank 0 refuses what goes deeper, and says so
        return None
    if is_plain_dict(value):
        found = {key: own for key, item in value.items() if (own := _own_values(item, depth + 1)) is not None}
        return found or None
    if type(value) in (list, tuple):
        items = [_own_values(item, depth + 1) for item in value]
        return None if all(item is None for item in items) else items
    return None


def fingerprint(checkpoint: Mapping[str, Any], position: Hashable) -> Hashable | None:
    """A value that differs for two saves if a trace is found of a change between them; None where none can be.

    What is looked at: ``position`` (how far training is), each tensor's place in memory and version counter, and,
    because fused optimizers and ``.data`` bump no counter, a sample of its contents; of small ones the whole contents.
    Equal values are no proof: a few elements may have been written behind torch's back.
    """
    seen = xxhash.xxh3_128()
    elsewhere: list[Tensor] = []
    for path, leaf in _leaves(checkpoint, ()):
        if not isinstance(leaf, Tensor):
            seen.update(repr((path, leaf.dtype, leaf.shape)).encode())
            seen.update(leaf.tobytes())
            continue
        if type(leaf) not in (Tensor, nn.Parameter, nn.Buffer) or leaf.layout is not torch.strided or leaf.is_quantized:
            return None
        leaf = leaf.detach()
        seen.update(repr((path, leaf.dtype, tuple(leaf.shape), leaf.stride())).encode())
        if leaf.device.type == "cpu" and leaf.nbytes <= _WHOLE_BYTES:
            seen.update(_bytes(leaf))
            continue
        seen.update(repr((leaf.data_ptr(), None if leaf.is_inference() else leaf._version)).encode())
        sample = _sample(leaf)
        if leaf.device.type == "cpu":
            seen.update(_bytes(sample))
        else:
            elsewhere.append(sample)
    by_device: dict[torch.device, list[Tensor]] = {}
    for sample in elsewhere:
        by_device.setdefault(sample.device, []).append(sample.contiguous().reshape(-1).view(torch.uint8))
    for samples in by_device.values():
        seen.update(_bytes(torch.cat(samples).cpu()))  # one synchronisation a device
    return (position, seen.digest())


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The tensors and numpy arrays of nested containers, each with its place."""
    if isinstance(value, Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "tobytes")):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, PerRank):
        yield from _leaves(value.value, path)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))


def _sample(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        return tensor[tuple(slice(None, None, max(1, size // 2)) for size in tensor.shape)]
    count = min(_SAMPLES, tensor.numel())
    return tensor.as_strided((count,), (max(1, tensor.numel() // count),)) if count else tensor


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
