"""From the dict that Lightning wants saved to the state that the engine takes: who holds what, and what changed since.

Under DDP every rank has the same dict. Its model and optimizer states are replicated, so they become `ModuleState` and
`OptimizerState` and each rank writes a part of them. Where they are sharded, each rank writes what it has, as it does
of every distributed tensor. Everything else is rank 0's word alone, as it is in stock Lightning, but for what a hook
marked with `PerRank`: a callback's tensors may well have another shape on another rank.
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Final

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardckpt.lightning.lazy import plain
from shardckpt.state import ModuleState, OptimizerState, PerRank, Share
from shardckpt.state.leaves import is_distributed, local_parts
from shardckpt.state.names import clean_names, clean_parameters
from shardckpt.state.skeleton import MAX_DEPTH

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
        self._module: ModuleState | None = None
        self._optimizers: list[OptimizerState] = []

    def module(self, state: ModuleState) -> None:
        """Note the model's state: the first thing that Lightning asks for, so older notes are void."""
        self._module = state
        self._optimizers = []

    def optimizer(self, state: OptimizerState) -> None:
        self._optimizers.append(state)

    def forget(self) -> None:
        self._module = None
        self._optimizers = []

    def module_state(self, value: Any) -> ModuleState | None:
        """``value`` as the model's state, if it is what the strategy made and still shows the live parameters."""
        if self._module is None or self._module.state_dict is not value:
            return None
        names = clean_names(self._module.module, list(value))
        live = clean_parameters(self._module.module)
        if all(_shows(value[raw], live[name]) for raw, name in names.items() if name in live):
            return self._module
        return None

    def optimizer_state(self, value: Any) -> OptimizerState | None:
        """``value`` as an optimizer's state, if it is what the strategy made, with equal contents on every rank."""
        for state in self._optimizers:
            if state.state_dict is value and not hasattr(state.optimizer, "consolidate_state_dict"):
                return state
        return None


def _shows(value: Any, parameter: Tensor) -> bool:
    if is_distributed(value):  # it says itself what it is, whatever memory it is in
        return True
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
    """What a rank other than 0 contributes: its part of distributed tensors, wherever they are, and of the live states.

    Of those, whose ``layout`` rank 0 has told, come the parameters and all that belongs to the optimizers. Buffers come
    from rank 0, unless the user declared them equal on all ranks (``with_buffers``). And whatever is marked with
    `PerRank`, wherever it is.
    """
    share = Share()
    for key, value in state.items():
        part: Any = None
        if key in layout and isinstance(value, ModuleState):
            part = value._replace(state_dict=_own(value, with_buffers=with_buffers))
        elif isinstance(value, list):
            live = layout.get(key) or []
            items = [
                item if index in live and isinstance(item, OptimizerState) else _own_parts(item)
                for index, item in enumerate(value)
            ]
            part = items if any(item is not None for item in items) else None
        else:
            part = _own_parts(value)
        if part is not None:
            share[key] = part
    return share


def _own(model: ModuleState, *, with_buffers: bool) -> dict[str, Any]:
    kept = set(clean_parameters(model.module))
    if with_buffers:
        buffers = [name for name, _ in model.module.named_buffers(remove_duplicate=False)]
        kept |= set(clean_names(model.module, buffers).values())
    names = clean_names(model.module, list(model.state_dict))
    return {k: v for k, v in model.state_dict.items() if names[k] in kept or _is_own(v)}


def _is_own(value: Any) -> bool:
    """Whether a value is a part of something, the rest of which other ranks have, or differs by rank on purpose."""
    return isinstance(value, PerRank) or is_distributed(value)


def _own_parts(value: Any, depth: int = 0) -> Any:
    """What is every rank's to contribute, in the nested containers that it stands in; None where there is nothing."""
    if isinstance(value, (ModuleState, OptimizerState)):
        return _own_parts(value.state_dict, depth)
    if _is_own(value):
        return value
    if depth > MAX_DEPTH:  # the engine refuses what goes deeper, or contains itself, and says so
        return None
    if isinstance(value, Mapping):
        parts = {key: _own_parts(item, depth + 1) for key, item in value.items()}
        return {key: part for key, part in parts.items() if part is not None} or None
    if type(value) in (list, tuple):
        items = [_own_parts(item, depth + 1) for item in value]
        return items if any(item is not None for item in items) else None
    return None


def fingerprint(checkpoint: Mapping[str, Any], position: Hashable) -> Hashable | None:
    """A value that differs for two saves if a trace is found of a change between them; None where none can be.

    What is looked at: ``position`` (how far training is), each tensor's place in memory and version counter, and,
    because fused optimizers and ``.data`` bump no counter, a sample of its contents; of small ones the whole contents.
    The place is left out of a ShardedTensor's parts, which FSDP1 copies anew each time it is asked.
    Equal values are no proof: a few elements may have been written behind torch's back.
    """
    seen = xxhash.xxh3_128()
    elsewhere: list[Tensor] = []
    for path, leaf, place in _leaves(checkpoint, ()):
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
        seen.update(repr((place and leaf.data_ptr(), None if leaf.is_inference() else leaf._version)).encode())
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


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any, bool]]:
    """The tensors on this rank and numpy arrays of nested containers, with their paths, and whether they stay there."""
    if is_distributed(value):
        for part in local_parts(value):
            yield path, part, isinstance(value, DTensor)
    elif isinstance(value, Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "tobytes")):
        yield path, value, True
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
