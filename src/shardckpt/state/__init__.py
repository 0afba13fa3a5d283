"""State: the user's nested objects on one side, named tensors, JSON and bytes on the other.

`flatten` goes one way, `Match` the other. Nothing above this package asks what kind of object a value was.
"""

from shardckpt.state import meshes
from shardckpt.state.differences import Differences, together
from shardckpt.state.flatten import Flattened, flatten
from shardckpt.state.leaves import LocalTensor
from shardckpt.state.match import Match
from shardckpt.state.names import ModuleState, OptimizerState, Share, parameter_names
from shardckpt.state.skeleton import merge

__all__ = [
    "Differences",
    "Flattened",
    "LocalTensor",
    "Match",
    "ModuleState",
    "OptimizerState",
    "Share",
    "flatten",
    "merge",
    "meshes",
    "parameter_names",
    "together",
]
