"""State: the user's nested objects on one side, named tensors, JSON and bytes on the other.

`flatten` goes one way, `Matching` the other. Nothing above this package asks what kind of object a value was.
"""

from shardckpt.state import meshes
from shardckpt.state.differences import Differences, together
from shardckpt.state.flatten import flatten
from shardckpt.state.flattened import Flattened
from shardckpt.state.fresh import Maker
from shardckpt.state.leaves import LocalTensor
from shardckpt.state.match import walk
from shardckpt.state.matching import Matching
from shardckpt.state.materialise import meta_tensors
from shardckpt.state.names import ModuleState, OptimizerState, Share, parameter_names
from shardckpt.state.per_rank import PerRank
from shardckpt.state.renaming import KeyMap, rename
from shardckpt.state.skeleton import merge
from shardckpt.state.stepped import Stepped
from shardckpt.state.subtree import Prefix, hint, prefix_name, subtree

__all__ = [
    "Differences",
    "Flattened",
    "KeyMap",
    "LocalTensor",
    "Maker",
    "Matching",
    "ModuleState",
    "OptimizerState",
    "PerRank",
    "Prefix",
    "Share",
    "Stepped",
    "flatten",
    "hint",
    "merge",
    "meshes",
    "meta_tensors",
    "parameter_names",
    "prefix_name",
    "rename",
    "subtree",
    "together",
    "walk",
]
