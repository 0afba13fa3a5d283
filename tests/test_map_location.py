"""map_location, sentence by sentence of torch.load's documentation, beside torch.load itself wherever it can say."""

import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardckpt
from shardckpt import LoadFailedError, UsageError

STATE = {"w": torch.arange(12.0).reshape(3, 4), "n": torch.tensor(3), "none": torch.zeros(0, 2), "step": 5}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    shardckpt.save(STATE, tmp_path / "ck")
    return tmp_path / "ck"


def tag(path: Path, location: str) -> Path:
    """Have a checkpoint say that its tensors were saved on another device."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    for entry in manifest["tensors"].values():
        assert entry.get("location", "cpu") == "cpu"
        entry["location"] = location
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def torch_saved(location: str) -> io.BytesIO:
    """The same state in torch's own file, tagged with a location."""
    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: location)
        torch.save(STATE, buffer)
    buffer.seek(0)
    return buffer


def outcome(load: Callable[[], Any]) -> Any:
    """The device and the values of each tensor that was loaded, or that torch refused."""
    try:
        loaded = load()
    except (RuntimeError, ValueError) as error:
        return "CUDA" if "deserialize object on a CUDA device" in str(error) else "refused"
    return {
        name: (str(value.device), value.dtype, tuple(value.shape), None if value.is_meta else value.tolist())
        if isinstance(value, Tensor)
        else value
        for name, value in loaded.items()
    }


def to_meta(storage: torch.UntypedStorage, _: str) -> torch.UntypedStorage:
    return torch.UntypedStorage(storage.nbytes(), device="meta")


FORMS: dict[str, Any] = {
    "None": None,
    "string": "cpu",
    "string meta": "meta",
    "string cuda": "cuda:1",
    "string nonsense": "nowhere",
    "device": torch.device("cpu"),
    "device meta": torch.device("meta"),
    "device cuda": torch.device("cuda", 1),
    "dict": {"cuda:1": "cpu", "cpu": "cpu"},
    "dict of others": {"cuda:2": "cpu"},
    "dict from cpu": {"cpu": "meta"},
    "dict to cuda": {"cuda:1": "cuda:0"},
    "dict empty": {},
    "returns storage": lambda storage, _: storage,
    "returns copy": lambda storage, _: storage.clone(),
    "returns None": lambda storage, _: None,
    "returns meta": to_meta,
    "raises": lambda storage, _: {}["gone"],
}


@pytest.mark.parametrize("location", ("cpu", "cuda:1", "fake:0"))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_does_what_torch_load_does(saved, form, location):
    """None, a device, a string, a dict, a callable: the same tensors on the same devices, or the same refusal."""
    if location != "cpu":
        tag(saved, location)
    if form == "raises":
        with pytest.raises(LoadFailedError, match="gone"):
            shardckpt.load(saved, map_location=FORMS[form])
        return
    ours = outcome(lambda: shardckpt.load(saved, map_location=FORMS[form]))
    assert ours == outcome(lambda: torch.load(torch_saved(location), map_location=FORMS[form]))
    one = outcome(lambda: {"w": shardckpt.read_tensor(saved, "w", map_location=FORMS[form])})
    assert one == ours if isinstance(ours, str) else one["w"] == ours["w"]


def test_a_callable_is_called_once_for_each_storage_with_its_tag(saved):
    """It gets the storage on the CPU, as it was read, and the tag of the device that the tensor was saved from."""
    calls: dict[str, list[Any]] = {"ours": [], "torch": []}

    def listen(whose: str) -> Callable[[torch.UntypedStorage, str], None]:
        def heard(storage: torch.UntypedStorage, location: str) -> None:
            calls[whose].append((type(storage), storage.device.type, storage.nbytes(), location))

        return heard

    torch.load(torch_saved("cpu"), map_location=listen("torch"))
    shardckpt.load(saved, map_location=listen("ours"))
    assert sorted(map(repr, calls["ours"])) == sorted(map(repr, calls["torch"]))
    heard = []
    shardckpt.load(tag(saved, "cuda:1"), map_location=lambda storage, at: heard.append(at) or storage)
    assert heard == ["cuda:1"] * 3


def test_a_callable_sees_what_was_read(saved):
    """The storage has the tensor's bytes by then, so that it may be copied elsewhere."""
    seen = []

    def look(storage: torch.UntypedStorage, _: str) -> torch.UntypedStorage:
        seen.append(bytes(storage.tolist()))
        return storage

    shardckpt.load(saved, map_location=look)
    expected = [bytes(t.untyped_storage().tolist()) for t in STATE.values() if isinstance(t, Tensor)]
    assert sorted(seen) == sorted(expected)


def test_a_location_that_this_machine_lacks_is_an_error_with_the_remedy(saved):
    """A checkpoint from GPUs does not load silently onto the CPU: torch's advice is passed on."""
    tag(saved, "cuda:1")
    for call in (lambda: shardckpt.load(saved), lambda: shardckpt.read_tensor(saved, "w")):
        with pytest.raises(LoadFailedError, match=r"saved on 'cuda:1'.*map_location=torch\.device\('cpu'\)"):
            call()


def test_live_tensors_need_no_map_location(saved):
    """In place, the saved tag is of no account: GPU checkpoints restore into a CPU model, and the reverse."""
    tag(saved, "cuda:1")
    live = {name: torch.full_like(value, 7) if isinstance(value, Tensor) else 0 for name, value in STATE.items()}
    shardckpt.load(saved, live)
    assert all(torch.equal(live[name], STATE[name]) for name in ("w", "n", "none"))
    assert live["step"] == 5


def test_without_a_live_tensor_the_tag_counts(saved):
    """What is made anew goes where torch.load would put it, and nothing is changed where it cannot go."""
    tag(saved, "cuda:1")
    live: dict[str, Any] = {"w": torch.empty(3, 4, device="meta"), "step": 0}
    with pytest.raises(LoadFailedError, match=r"saved on 'cuda:1'.*Nothing was changed"):
        shardckpt.load(saved, live)
    assert live["w"].is_meta
    assert live["step"] == 0
    shardckpt.load(saved, live, map_location={"cuda:1": "cpu"})
    assert torch.equal(live["w"], STATE["w"])


def test_pickled_objects_follow_map_location(tmp_path):
    """Tensors within an object that only pickle knows go where all others go."""
    odd = {"tensors": torch.ones(2).as_subclass(Tagged)}
    shardckpt.save({"odd": odd}, tmp_path / "ck")
    loaded = shardckpt.load(tmp_path / "ck", map_location="meta", weights_only=False)
    assert loaded["odd"]["tensors"].is_meta


class Tagged(Tensor):
    """A kind of tensor that is pickled."""


@pytest.mark.parametrize("returned", (5, "cpu", torch.ones(2)))
def test_what_a_callable_may_not_return(saved, returned):
    """It returns a storage or None, says torch; anything else is named."""
    with pytest.raises(UsageError, match="must return a storage or None"):
        shardckpt.load(saved, map_location=lambda storage, _: returned)


def test_registered_packages_are_asked(saved, monkeypatch):
    """User extensions may register location tags of their own, which work here too."""
    tag(saved, "fake:0")
    registry = list(torch.serialization._package_registry)
    monkeypatch.setattr(torch.serialization, "_package_registry", registry)
    torch.serialization.register_package(
        1, lambda storage: None, lambda storage, location: storage if location.startswith("fake") else None
    )
    assert torch.equal(shardckpt.load(saved)["w"], STATE["w"])
    assert torch.equal(shardckpt.load(saved, map_location={"fake:0": "fake:1"})["w"], STATE["w"])


def test_parameters_of_plain_dicts_come_back_as_tensors(tmp_path):
    """Without a live state there is no Parameter to be; into one, it stays what it is."""
    shardckpt.save({"p": nn.Parameter(torch.ones(2))}, tmp_path / "ck")
    loaded = shardckpt.load(tmp_path / "ck")["p"]
    assert type(loaded) is Tensor
    assert not loaded.requires_grad
    live = {"p": nn.Parameter(torch.zeros(2))}
    p = live["p"]
    shardckpt.load(tmp_path / "ck", live)
    assert live["p"] is p
    assert torch.equal(p, torch.ones(2))


class Holder:
    """An object that keeps what it is given."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        return self.kept

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.kept = state_dict


@pytest.mark.parametrize("in_place", [False, True])
def test_what_was_read_is_let_go_while_it_is_moved(tmp_path: Path, in_place: bool) -> None:
    """Moving a state elsewhere takes no second copy of all of it: each tensor goes once it has been moved."""
    saved = Holder()
    saved.kept = {str(number): torch.rand(1000) for number in range(4)}
    shardckpt.save({"held": saved}, tmp_path / "ck")
    moved: list[weakref.ref[Any]] = []
    gone: list[int] = []

    def move(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        gone.append(sum(one() is None for one in moved))
        moved.append(weakref.ref(storage))
        return storage.clone()

    shardckpt.load(tmp_path / "ck", {"held": Holder()} if in_place else None, map_location=move)
    assert gone == [0, 1, 2, 3]
