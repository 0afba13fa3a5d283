"""States that tests save and restore, and how to compare them bit for bit."""

from collections.abc import Callable
from typing import Any

import torch
import xxhash
from torch import Tensor, nn


class TinyNet(nn.Module):
    """A model with the things that models have: shared weights, buffers, odd sizes, a matrix worth splitting."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 64)
        self.hidden = nn.Linear(64, 1031)
        self.back = nn.Linear(1031, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 97, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.back(torch.relu(self.hidden(x))))
        return self.head(x)


def train(
    seed: int, steps: int, *, ddp: bool, wrap: Callable[[nn.Module], Any] | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A TinyNet after some AdamW steps on data of its seed, equal on all ranks."""
    torch.manual_seed(seed)
    model: nn.Module = TinyNet()
    if wrap is not None:
        wrap(model)
    if ddp:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens = torch.randint(0, 97, (8, 16))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor, whole: a DTensor's are gathered, so every rank must ask."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest_of(state: dict[str, Any]) -> str:
    """Digest of the model, by name, and of the optimizer state, by parameter order; other keys are not part of it."""
    model, optimizer = state["model"], state["optimizer"]
    model = getattr(model, "module", model)
    hasher = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode() + str((tensor.dtype, tuple(tensor.shape))).encode() + bits(tensor))
    for parameter in model.parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            hasher.update(key.encode() + bits(value))
    hasher.update(repr([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]).encode())
    return str(hasher.hexdigest())
