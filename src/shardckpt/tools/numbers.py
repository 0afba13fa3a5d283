"""The numbers in tensors of any dtype that a checkpoint may have, in double precision."""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

_STRETCH: Final = 1 << 20
"""Elements converted at a time: doubles may take eight times the memory of what they are made from."""

_FLOAT4: Final = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FLOAT4_E2M1: Final = torch.cat([_FLOAT4, -_FLOAT4])
"""The number that each four bits of ``float4_e2m1fn_x2`` stand for, of which torch can show none."""


def stretches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Contiguous tensors of one shape, flat and side by side, in parts of a bounded number of elements."""
    for parts in zip(*(torch.split(tensor.reshape(-1), _STRETCH) for tensor in tensors), strict=True):
        yield tuple(parts)


def octets(tensor: Tensor) -> Tensor:
    """The bytes of a flat, contiguous tensor: shape (elements, bytes of one)."""
    return tensor.view(torch.uint8).reshape(tensor.numel(), tensor.element_size())


def doubles(tensor: Tensor) -> Tensor:
    """The numbers in a flat tensor as float64: shape (elements, numbers in one).

    An element is one number, but two where it is complex (real, imaginary) or a pair of 4-bit floats.
    """
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        bits = tensor.view(torch.uint8)
        halves = torch.stack([bits & 15, bits >> 4], dim=1)
        return _FLOAT4_E2M1[halves.long()].double()
    if tensor.is_complex():
        if tensor.dtype == torch.complex32:  # of which torch can view the halves, and little else
            return torch.view_as_real(tensor).double()
        return torch.view_as_real(tensor.to(torch.complex128))
    if tensor.is_floating_point() and tensor.element_size() == 1:  # every 8-bit float has a float32, not all a double
        tensor = tensor.float()
    return tensor.double().unsqueeze(1)
