"""What the package shows to the outside: its names, its types, and what importing it costs."""

import inspect
import subprocess
import sys
from importlib.metadata import entry_points, version
from importlib.resources import files
from typing import get_type_hints

import pytest

import shardckpt
from shardckpt import errors
from shardckpt.options import CheckpointerOptions

EXPORTED = [
    "CheckpointManager",
    "Checkpointer",
    "Fault",
    "LoadReport",
    "PendingSave",
    "PerRank",
    "SaveReport",
    "ShardedCheckpointIO",
    "VerifyReport",
    "async_save",
    "is_checkpoint",
    "latest",
    "load",
    "read_tensor",
    "save",
    "verify",
]
ERRORS = [
    "CheckpointNotFoundError",
    "ConflictingStateError",
    "CorruptCheckpointError",
    "LoadFailedError",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "RankTimeoutError",
    "RemoteError",
    "SaveFailedError",
    "ShardckptError",
    "StateMismatchError",
    "StorageAccessError",
    "StorageError",
    "StorageFullError",
    "TensorIndexError",
    "TensorNotFoundError",
    "UncertainCommitError",
    "UnsafeLoadError",
    "UnserialisableError",
    "UnsupportedFormatError",
    "UsageError",
]


def test_exported_names_are_pinned() -> None:
    """A name that users import neither appears nor disappears without somebody deciding it here."""
    assert sorted(shardckpt.__all__) == sorted(EXPORTED + ERRORS)


def test_all_is_sorted() -> None:
    """Two branches that add a name meet in one place, and a reader finds a name."""
    assert list(shardckpt.__all__) == sorted(shardckpt.__all__)


def test_every_error_is_exported() -> None:
    """Whatever we raise can be caught without reaching into our modules, and has our root."""
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == set(ERRORS)
    assert all(issubclass(getattr(errors, name), errors.ShardckptError) for name in ERRORS)


@pytest.mark.parametrize("name", [*EXPORTED, *ERRORS])
def test_every_exported_name_exists(name: str) -> None:
    """No name is promised that an import would not find, those that are looked up late included."""
    assert getattr(shardckpt, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The late lookup of names does not swallow typing mistakes."""
    with pytest.raises(AttributeError, match="asink_save"):
        _ = shardckpt.asink_save  # type: ignore[attr-defined]


def test_import_stays_light() -> None:
    """``import shardckpt`` works, and is quick, where Lightning, S3 clients and typer are missing or not wanted."""
    heavy = {"lightning", "pytorch_lightning", "s3fs", "botocore", "aiohttp", "obstore", "typer", "rich"}
    program = f"import sys, shardckpt; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.split() == []


ALONE = """
import sys, warnings
for name in "numpy s3fs obstore lightning pytorch_lightning typer rich safetensors transformers".split():
    sys.modules[name] = None
warnings.simplefilter("ignore")  # torch misses numpy, too
import torch, shardckpt
from shardckpt.tools import convert, diff
root = sys.argv[1]
state = {"model": torch.nn.Linear(3, 4), "loose": torch.arange(5)}
shardckpt.save(state, f"{root}/one")
shardckpt.async_save(state | {"loose": torch.arange(5) + 7}, f"{root}/other").result()
shardckpt.load(f"{root}/other", state)
assert state["loose"].tolist() == [7, 8, 9, 10, 11], state
assert not shardckpt.verify(f"{root}/one").faults
assert {one.max_abs for one in diff(f"{root}/one", f"{root}/other").tensors if one.verdict != "equal"} == {7}
convert(f"{root}/one", f"{root}/one.safetensors")
convert(f"{root}/one.safetensors", f"{root}/back")
assert shardckpt.load(f"{root}/back")["loose"].tolist() == [0, 1, 2, 3, 4]
"""


def test_what_is_no_dependency_is_not_needed(tmp_path) -> None:
    """Where nothing but torch and the core's own dependencies is installed, all works that names none of the others."""
    program = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(program, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_types_are_shipped() -> None:
    """Type checkers read our annotations only if the marker is part of the package."""
    assert files("shardckpt").joinpath("py.typed").is_file()


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"])
def test_entry_points_resolve(package: str) -> None:
    """Lightning finds the adapter through installed metadata: a renamed function would fail silently in training."""
    found = [point for point in entry_points(group=f"{package}.callbacks_factory") if point.name == "shardckpt"]
    assert len(found) == 1
    assert callable(found[0].load())


def test_version_is_the_installed_one() -> None:
    """Manifests name the version that wrote them, so there is one source for it."""
    assert shardckpt.__version__ == version("shardckpt")


def test_the_options_that_are_passed_on_are_those_of_the_checkpointer() -> None:
    """Whoever types `ShardedCheckpointIO(` is offered what `Checkpointer` takes, of the same types."""
    taken = {
        name: parameter.annotation
        for name, parameter in inspect.signature(shardckpt.Checkpointer).parameters.items()
        if name != "alone"
    }
    assert taken == get_type_hints(CheckpointerOptions)
