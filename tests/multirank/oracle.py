"""The same state saved and restored by DCP and by us. Runs in the processes of `ranks`.

DCP steps an optimizer that has no state; these have, and its state dicts are keyed by name.
"""

import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import shardckpt
from multirank.matrix import Side, images, spoil
from multirank.matrix_layouts import LAYOUTS

KIND = "foreach"
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def side(number: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    found = Side(LAYOUTS[number])
    return found.model, found.optimizers[KIND]


def dcp_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": of_model, "optimizer": of_optimizer}


def save(rank: int, root: str, numbers: list[int]) -> None:
    for number in numbers:
        model, optimizer = side(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dcp_state(model, optimizer), checkpoint_id=f"{root}/{number}-dcp")
        shardckpt.save({"model": model, "optimizer": optimizer}, f"{root}/{number}-ours")


def load(rank: int, root: str, target: int, sources: list[int]) -> int:
    """Restore each source twice into one layout; returns how many values were compared."""
    compared = 0
    model, optimizer = side(target)
    for source in sources:
        spoil(model, {KIND: optimizer})
        shardckpt.load(f"{root}/{source}-ours", {"model": model, "optimizer": optimizer})
        ours = images(model, {KIND: optimizer})
        spoil(model, {KIND: optimizer})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = dcp_state(model, optimizer)
            dcp.load(state, checkpoint_id=f"{root}/{source}-dcp")
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=OPTIONS,
            )
        theirs = images(model, {KIND: optimizer})
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == theirs[name], (LAYOUTS[source], LAYOUTS[target], name, value, theirs[name])
        compared += len(ours)
    return compared
