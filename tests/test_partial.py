"""A part of a checkpoint: of its keys, of its tree, of a tensor; and under other names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import shardckpt
from shardckpt import StateMismatchError, TensorIndexError, TensorNotFoundError, UsageError, indexing
from shardckpt.box import slices
from shardckpt.commit import reading
from shardckpt.storage import Storage
from storage.wrappers import CountingStorage, WrapperStorage


class Ranges(WrapperStorage):
    """Remembers which bytes of which file were read."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.read: list[tuple[str, int, int]] = []

    def read_into(self, name: str, offset: int, into: memoryview, *, cached: bool = True) -> None:
        self.read.append((name, offset, offset + into.nbytes))
        super().read_into(name, offset, into, cached=cached)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The storages that loads open from now on, each with the ranges that were read."""
    opened: list[Any] = []
    real = reading.open_storage

    def watching(*args: Any) -> Storage:
        opened.append(Ranges(CountingStorage(real(*args))))
        return opened[-1]

    monkeypatch.setattr(reading, "open_storage", watching)
    return opened


class Net(nn.Module):
    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden))
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Renamed(nn.Module):
    """A Net whose parts have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x))


TO_RENAMED = {"model.encoder": "model.backbone", "model.head": "model.classifier"}


def trained(kind: type[nn.Module] = Net, steps: int = 2) -> dict[str, Any]:
    torch.manual_seed(3)
    model = kind()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "step": steps}


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    """Of the model and the optimizer, in the order of parameters."""
    parameters = list(state["model"].parameters())
    moments = [state["optimizer"].state[p][key] for p in parameters for key in ("step", "exp_avg", "exp_avg_sq")]
    return [*state["model"].state_dict().values(), *moments]


def all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    state = trained()
    shardckpt.save(state, tmp_path / "ck")
    return tmp_path / "ck", state


# -- top-level keys ---------------------------------------------------------------------------------------------------


def test_the_model_alone_reads_nothing_of_the_rest(tmp_path, watched):
    """Fine-tuning from a full checkpoint must not cost the optimizer's bytes, which are twice the model's."""
    big = nn.Linear(1024, 1024)
    optimizer = torch.optim.AdamW(big.parameters())
    big(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    shardckpt.save({"model": big, "optimizer": optimizer, "step": 1}, tmp_path / "ck")
    opened = shardckpt.Checkpointer().open(tmp_path / "ck")
    rest = [
        (entry.offset[0], entry.offset[0] + entry.nbytes[0])
        for name, entry in opened.manifest.tensors.items()
        if name.startswith("optimizer") and entry.nbytes[0] > 1 << 20
    ]
    assert len(rest) == 2
    model = nn.Linear(1024, 1024)
    report = shardckpt.load(tmp_path / "ck", {"model": model})
    assert torch.equal(model.weight, big.weight)
    assert report.skipped == ["optimizer", "step"]
    page = 4096  # reads begin and end at pages
    for name, start, stop in watched[-1].read:
        if name.endswith(".safetensors"):
            for first, last in rest:
                assert min(stop, last) - max(start, first) < page
    assert report.bytes_read < 4 * 1024 * 1025 + (64 << 10)


# -- prefix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ("model.encoder", ("model", "encoder")))
def test_a_prefix_may_cut_into_a_module(saved, prefix):
    """A part of a saved module restores into a module of its own, and comes back as its state dict."""
    path, state = saved
    encoder = Net().encoder
    report = shardckpt.load(path, encoder, prefix=prefix)
    assert all_equal(list(encoder.state_dict().values()), list(state["model"].encoder.state_dict().values()))
    assert "model.encoder.0.weight" in report.restored
    loaded = shardckpt.load(path, prefix=prefix)
    assert list(loaded) == list(encoder.state_dict())
    assert loaded._metadata["1"] == {"version": 2}  # BatchNorm's, without which it would miss a buffer
    nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).load_state_dict(loaded)


def test_a_prefix_reaches_everything(tmp_path):
    """Dicts, lists, modules in them, tensors, plain values and optimizer state, by text as names have it or by keys."""
    w = torch.arange(3.0)
    state = {
        "a": {"b.c": {"d": w}, 7: ["x", {"y": w + 1}], ("t", 1): "tuple"},
        "l": [nn.Linear(2, 2), (1, {"z": 5})],
    } | trained()
    shardckpt.save(state, tmp_path / "ck")

    def at(prefix: Any) -> Any:
        return shardckpt.load(tmp_path / "ck", prefix=prefix)

    assert torch.equal(at("a.b.c.d"), w)
    assert torch.equal(at(("a", "b.c"))["d"], w)
    assert torch.equal(at("a.7.1.y"), w + 1)
    assert torch.equal(at(("a", 7, 1, "y")), w + 1)
    assert at(("a", ("t", 1))) == "tuple"
    assert at("l.1.1.z") == 5
    assert torch.equal(at("l.0.weight"), state["l"][0].weight)
    assert at("step") == 2
    first = state["optimizer"].state[state["model"].encoder[0].weight]["exp_avg"]
    for prefix in (
        "optimizer.state.model.encoder.0.weight.exp_avg",
        "optimizer.state.0.exp_avg",
        ("optimizer", "state", 0, "exp_avg"),
    ):
        assert torch.equal(at(prefix), first), prefix
    assert at("optimizer.param_groups.0.lr") == 0.1
    assert at("optimizer")["param_groups"][0]["params"] == [0, 1, 2, 3, 4, 5]
    assert at("").keys() == at(()).keys() == state.keys()


@pytest.mark.parametrize(
    "prefix", ("model.encodr", ("model", "encodr"), "model.encodr.0", "step.x", "model.encoder.0.weight.x", "l.5")
)
def test_a_prefix_that_is_not_there_names_what_is_near(saved, prefix):
    """A typing mistake is answered with the names that exist, before anything changed."""
    path, _ = saved
    encoder = Net().encoder
    before = [tensor.clone() for tensor in encoder.state_dict().values()]
    with pytest.raises(TensorNotFoundError, match="the checkpoint has nothing at") as caught:
        shardckpt.load(path, encoder, prefix=prefix)
    assert isinstance(caught.value, KeyError)
    if "encodr" in str(prefix):
        assert "'model.encoder" in str(caught.value)
    assert all_equal(list(encoder.state_dict().values()), before)
    with pytest.raises(TensorNotFoundError):
        shardckpt.load(path, prefix=prefix)


def test_text_that_means_two_places_asks_for_keys(tmp_path):
    """{"a": {"b": 1}, "a.b": 2} has two places called a.b, and neither is the one to guess."""
    shardckpt.save({"a": {"b": 1}, "a.b": 2}, tmp_path / "ck")
    with pytest.raises(UsageError, match="tuple of keys"):
        shardckpt.load(tmp_path / "ck", prefix="a.b")
    assert shardckpt.load(tmp_path / "ck", prefix=("a", "b")) == 1
    assert shardckpt.load(tmp_path / "ck", prefix=("a.b",)) == 2


@pytest.mark.parametrize("prefix", (5, ["model"], b"model"))
def test_a_prefix_of_another_type_is_refused(saved, prefix):
    """What is no place is said to be none."""
    with pytest.raises(UsageError, match="prefix is"):
        shardckpt.load(saved[0], prefix=prefix)


def test_differences_under_a_prefix_are_named_and_change_nothing(saved):
    """The error says below which place the names are."""
    path, _ = saved
    wrong = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4), nn.Linear(1, 1))
    with pytest.raises(StateMismatchError, match=r"at 'model\.encoder'") as caught:
        shardckpt.load(path, wrong, prefix="model.encoder")
    for line in ("0.weight: shape (5, 3) here, (4, 3)", "missing from the checkpoint: 2.weight"):
        assert line in str(caught.value)


@pytest.mark.parametrize("bare", (True, False))
def test_optimizer_state_under_a_prefix(tmp_path, bare):
    """An optimizer finds its state by names below the prefix, or alone by the order of its parameters."""
    state = trained()
    shardckpt.save({"run": {"inner": state}}, tmp_path / "ck")
    live = trained(steps=1)
    if bare:
        shardckpt.load(tmp_path / "ck", live["model"], prefix="run.inner.model")
        shardckpt.load(tmp_path / "ck", live["optimizer"], prefix="run.inner.optimizer")
    else:
        live["optimizer"] = torch.optim.AdamW([{"params": list(live["model"].parameters())[::-1]}])  # names, not order
        shardckpt.load(tmp_path / "ck", live, prefix="run.inner")
        assert live["step"] == 2
    assert all_equal(tensors_of(live), tensors_of(state))
    assert live["optimizer"].param_groups[0]["lr"] == 0.1


def test_an_optimizer_with_parameters_inside_and_outside_of_the_prefix(tmp_path):
    """Names below the prefix count from there; others stay whole, though they may look alike."""
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*inner.parameters(), *outer.parameters()], momentum=0.5)
    (inner(torch.ones(1, 2)).sum() + 2 * outer(torch.ones(1, 2)).sum()).backward()
    optimizer.step()
    shardckpt.save({"m": outer, "run": {"m": inner, "opt": optimizer}}, tmp_path / "ck")
    live = nn.Linear(2, 2)
    fresh = torch.optim.SGD(live.parameters(), momentum=0.5)
    report = shardckpt.load(tmp_path / "ck", {"m": live, "opt": fresh}, prefix="run", strict=False)
    assert torch.equal(fresh.state[live.weight]["momentum_buffer"], optimizer.state[inner.weight]["momentum_buffer"])
    assert [line.rpartition(" ")[2] for line in report.unexpected] == ["m.weight~2", "m.bias~2"]


# -- key maps ---------------------------------------------------------------------------------------------------------


def from_callable(name: str) -> str:
    return name.replace("encoder", "backbone").replace("head", "classifier")


@pytest.mark.parametrize("key_map", (TO_RENAMED, from_callable), ids=("dict", "function"))
def test_a_renamed_module_and_the_state_of_its_optimizer(saved, key_map):
    """A refactored model resumes: optimizer state follows its parameter to the new name."""
    path, state = saved
    live = trained(Renamed, steps=1)
    live["optimizer"] = torch.optim.AdamW([{"params": list(live["model"].parameters())[::-1]}])
    shardckpt.load(path, live, key_map=key_map)
    assert all_equal(tensors_of(live), tensors_of(state))
    loaded = shardckpt.load(path, key_map=key_map)
    assert list(loaded["model"]) == list(live["model"].state_dict())
    Renamed().load_state_dict(loaded["model"])
    assert loaded["model"]._metadata["backbone.1"] == {"version": 2}


class Pair(nn.Module):
    """Two weights, or one with two names."""

    def __init__(self, tied: bool, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(3, 3, bias=False))
        if tied:
            getattr(self, names[1]).weight = getattr(self, names[0]).weight


def stepped(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ("ab", {"prefix": "trainer"}),
        ("xy", {"prefix": "trainer", "key_map": {"model.a": "model.x", "model.b": "model.y"}}),
        ("ba", {"prefix": "trainer", "key_map": {"model.a": "model.b", "model.b": "model.a"}}),
    ],
)
def test_weights_are_untied_with_their_state_under_other_names(tmp_path, names, options):
    """What was one weight when it was saved is known by the names of then; each of two goes on from its state."""
    saved = stepped(Pair(True, "a", "b"))
    shardckpt.save({"trainer": saved}, tmp_path / "ck")
    model = Pair(False, *names)
    optimizer = torch.optim.AdamW(model.parameters())
    shardckpt.load(tmp_path / "ck", {"model": model, "optimizer": optimizer}, **options)
    expected = saved["optimizer"].state[saved["model"].a.weight]["exp_avg"]
    assert [torch.equal(optimizer.state[weight]["exp_avg"], expected) for weight in model.parameters()] == [True] * 2


def test_a_new_parameter_does_not_inherit_through_an_old_name(tmp_path):
    """A name that a tied weight once had, and that another has now, leads to no state."""
    shardckpt.save(stepped(Pair(True, "a", "b")), tmp_path / "ck")
    model = Pair(False, "a", "b", "z")
    optimizer = torch.optim.AdamW(model.parameters())
    report = shardckpt.load(
        tmp_path / "ck", {"model": model, "optimizer": optimizer}, key_map={"model.b": "model.z"}, strict=False
    )
    assert "model.b.weight" in report.missing
    assert [weight in optimizer.state for weight in (model.a.weight, model.b.weight, model.z.weight)] == [1, 0, 1]


class Factored(torch.optim.Optimizer):
    """State that shows nothing of its parameter's shape as a whole."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"row": torch.randn(parameter.shape[0]), "column": torch.randn(parameter.shape[1])}


@pytest.mark.parametrize("options", [{}, {"prefix": "t"}, {"prefix": "t", "key_map": {"model": "model"}}])
def test_state_is_held_against_the_parameter_that_it_was_saved_of(tmp_path, options):
    """Names that two parameters exchange do not confuse their shapes, and other names do not hide a misfit."""
    model = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(4, 5, bias=False)})
    saved = {"model": model, "optimizer": Factored(model.parameters())}
    shardckpt.save({"t": saved} | saved, tmp_path / "ck")
    swapped = nn.ModuleDict({"a": nn.Linear(4, 5, bias=False), "b": nn.Linear(2, 3, bias=False)})
    live = {"model": swapped, "optimizer": Factored(swapped.parameters())}
    live["optimizer"].state.clear()
    report = shardckpt.load(tmp_path / "ck", live, strict=False, **options)
    assert sum("of a parameter of shape" in line for line in report.mismatched) == 2
    assert not live["optimizer"].state
    swap = {"model.a": "model.b", "model.b": "model.a"}
    shardckpt.load(tmp_path / "ck", live, **options | {"key_map": swap})
    for ours, theirs in ((swapped["a"], model["b"]), (swapped["b"], model["a"])):
        assert torch.equal(ours.weight, theirs.weight)
        state, expected = live["optimizer"].state[ours.weight], saved["optimizer"].state[theirs.weight]
        assert all(torch.equal(state[key], expected[key]) for key in ("row", "column"))


def test_names_of_a_key_map_count_from_the_prefix(saved):
    """With a prefix, names are those of the sub-tree; the longest key of a dict counts."""
    path, state = saved
    live = Renamed()
    key_map = {"encoder": "elsewhere", "encoder.0": "backbone.0", "encoder.1": "backbone.1", "head": "classifier"}
    shardckpt.load(path, live, prefix="model", key_map=key_map)
    assert all_equal(list(live.state_dict().values()), list(state["model"].state_dict().values()))


def test_parts_of_a_module_move_to_modules_of_their_own(saved):
    """One saved module may become two, at any depth, and two become one."""
    path, state = saved
    live = {"parts": {"backbone": Net().encoder}, "top": Net().head}
    shardckpt.load(path, live, key_map={"model.encoder": "parts.backbone", "model.head": "top"})
    together = [*live["parts"]["backbone"].state_dict().values(), *live["top"].state_dict().values()]
    assert all_equal(together, list(state["model"].state_dict().values()))
    shardckpt.save(live, path)
    model = Net()
    shardckpt.load(path, {"model": model}, key_map={"parts.backbone": "model.encoder", "top": "model.head"})
    assert all_equal(list(model.state_dict().values()), list(state["model"].state_dict().values()))
    bare = Net()
    shardckpt.load(path, bare, key_map={"parts.backbone": "encoder", "top": "head"})
    assert all_equal(list(bare.state_dict().values()), list(state["model"].state_dict().values()))


def test_a_bare_module_becomes_a_part_of_a_state(tmp_path):
    """What was saved as the whole state restores into a module under a key."""
    model, live = Net(), Net()
    shardckpt.save(model, tmp_path / "ck")
    for key_map in (lambda name: f"net.{name}", {"": "net"}):
        live = Net()
        shardckpt.load(tmp_path / "ck", {"net": live}, key_map=key_map)
        assert all_equal(list(live.state_dict().values()), list(model.state_dict().values()))


def test_plain_dicts_are_renamed_too(tmp_path):
    """Keys of nested dicts, flat keys with dots, and what lies in lists; two names may be exchanged."""
    state = {"a": {"x": 1, "y": torch.ones(2)}, "b": {"x": 2}, "flat": {"p.q": 3}, "l": [{"k": 4}, {"k": 5}]}
    shardckpt.save(state, tmp_path / "ck")
    key_map = {"a": "b", "b": "a", "a.x": "n.m.x", "flat.p": "flat.r", "l.0.k": "l.0.j"}
    loaded = shardckpt.load(tmp_path / "ck", key_map=key_map)
    assert torch.equal(loaded["b"].pop("y"), torch.ones(2))
    assert loaded == {"b": {}, "a": {"x": 2}, "n": {"m": {"x": 1}}, "flat": {"r.q": 3}, "l": [{"j": 4}, {"k": 5}]}
    live: dict[str, Any] = {"n": {"m": {"x": 0}}}
    shardckpt.load(tmp_path / "ck", live, key_map=key_map)
    assert live == {"n": {"m": {"x": 1}}}


@pytest.mark.parametrize(
    ("key_map", "message"),
    (
        ({"model.encoder.0.weight": "model.w", "model.head.weight": "model.w"}, r"0\.weight' and .* called 'model\.w'"),
        ({"model.encoder.0.weight": "model.head.weight"}, r"'model\.encoder\.0\.weight' and 'model\.head\.weight'"),
        (lambda name: "model.w" if name.endswith("weight") else name, r"both be called 'model\.w'"),
        ({"model.encodr": "model.backbone"}, r"nothing called 'model\.encodr'.*'model\.encoder'"),
        ({"step": "optimizer"}, "step"),
        ({"step": "model"}, "'model' already"),
        ({"step": ""}, "'step' of the checkpoint would have no name"),
        (lambda name: 5, r"returned a int"),
        ({"model": 5}, "no string"),
        (5, "key_map is a dict"),
    ),
    ids=("two on one", "on another", "function", "typo", "optimizer", "module", "empty", "int", "to int", "type"),
)  # fmt: skip
def test_key_maps_that_cannot_be(saved, key_map, message):
    """Each is refused with the names that matter, and nothing is changed."""
    path, _ = saved
    live = trained(steps=1)
    before = [tensor.clone() for tensor in tensors_of(live)]
    for call in (lambda: shardckpt.load(path, live, key_map=key_map), lambda: shardckpt.load(path, key_map=key_map)):
        with pytest.raises(UsageError, match=message):
            call()
    assert all_equal(tensors_of(live), before)
    assert live["step"] == 1


def test_a_key_that_matches_nothing_passes_where_that_is_allowed(saved):
    """strict=False restores what matches, of a key map too."""
    path, state = saved
    model = Net()
    shardckpt.load(path, {"model": model}, key_map={"model.tail": "model.end"}, strict=False)
    assert torch.equal(model.head.weight, state["model"].head.weight)


def test_items_of_a_list_keep_their_places(tmp_path):
    """A list has no names to change; what is in its items has."""
    shardckpt.save({"l": [{"k": 4}, {"k": 5}]}, tmp_path / "ck")
    with pytest.raises(UsageError, match=r"'l\.0' of the checkpoint is an item of a list"):
        shardckpt.load(tmp_path / "ck", key_map={"l.0": "first"})
    assert shardckpt.load(tmp_path / "ck", key_map={"l": "m"}) == {"m": [{"k": 4}, {"k": 5}]}


# -- parts of a tensor ------------------------------------------------------------------------------------------------

bounds = st.none() | st.integers(-9, 9)
items = st.one_of(
    st.integers(-7, 7),
    st.builds(slice, bounds, bounds, st.none() | st.integers(1, 4)),
    st.just(...),
)
indices = items | st.lists(items, max_size=5).map(tuple)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=4).map(tuple), indices)
def test_an_index_means_what_it_means_to_torch(shape, index):
    """Shape, elements and refusal of every index are those of a tensor; the box is no larger than it must be."""
    full = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    if isinstance(index, tuple) and sum(item is ... for item in index) > 1:
        with pytest.raises(UsageError):  # torch takes a second Ellipsis for a slice; numpy and we do not
            indexing.select(index, shape, "t")
        return
    try:
        expected = full[index]
    except IndexError:
        with pytest.raises(TensorIndexError, match="^t: "):
            indexing.select(index, shape, "t")
        return
    box, within = indexing.select(index, shape, "t")
    part = full[slices(box)]
    assert part.shape == box.lengths
    assert torch.equal(part[within], expected)
    assert part[within].shape == expected.shape
    if expected.numel():
        positions = full.flatten().tolist() and [divmod_all(int(n), shape) for n in expected.flatten()]
        assert box.offsets == tuple(map(min, zip(*positions, strict=True)))
        assert box.ends == tuple(max(axis) + 1 for axis in zip(*positions, strict=True))


def divmod_all(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The position of the element of that number in a row-major array."""
    found = []
    for size in reversed(shape):
        number, position = divmod(number, size)
        found.append(position)
    return tuple(reversed(found))


def test_read_tensor_with_an_index(tmp_path):
    """The public function takes it, of names and aliases, of matrices and of single numbers."""
    x, scalar = torch.arange(60.0).reshape(3, 4, 5), torch.tensor(7)
    shardckpt.save({"x": x, "same": x, "scalar": scalar, "none": torch.zeros(0, 3)}, tmp_path / "ck")
    for index in (1, -1, slice(1, None, 2), (..., 2), (0, slice(None, None, 3), -2), (slice(2, 1),), (), ...):
        for name in ("x", "same"):
            found = shardckpt.read_tensor(tmp_path / "ck", name, index)
            assert torch.equal(found, x[index])
            assert found.is_contiguous()
    assert torch.equal(shardckpt.read_tensor(tmp_path / "ck", "scalar", ...), scalar)
    assert shardckpt.read_tensor(tmp_path / "ck", "none", slice(0, 5)).shape == (0, 3)
    assert shardckpt.read_tensor(tmp_path / "ck", "x", 1, map_location="meta").shape == (4, 5)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    (
        (3, TensorIndexError, "index 3 is out of range for dimension 0 of size 3"),
        ((0, -5), TensorIndexError, "index -5 is out of range for dimension 1 of size 4"),
        ((0, 0, 0, 0), TensorIndexError, "4 indices for a tensor of 3"),
        (None, UsageError, "not None"),
        (True, UsageError, "not a bool"),
        ([0, 1], UsageError, "not a list"),
        (torch.tensor(1), UsageError, "not a Tensor"),
        (1.0, UsageError, "not a float"),
        (slice(None, None, -1), UsageError, "backward"),
        (slice(None, None, 0), UsageError, "zero"),
        (slice("a", None), UsageError, "no slice"),
        ((..., ...), UsageError, "more than one Ellipsis"),
    ),
)
def test_indices_that_are_refused(tmp_path, index, error, message):
    """What a tensor would take and we do not, and what it would not take either, each says which and why."""
    shardckpt.save({"x": torch.zeros(3, 4, 5)}, tmp_path / "ck")
    with pytest.raises(error, match=message) as caught:
        shardckpt.read_tensor(tmp_path / "ck", "x", index)
    assert "x: " in str(caught.value)
    assert isinstance(caught.value, IndexError) == (error is TensorIndexError)


def test_a_part_of_a_tensor_costs_its_bytes(tmp_path, watched):
    """Rows of a large tensor are read without the rest, to the block of 1 MiB that a digest covers."""
    x = torch.arange(8 << 20, dtype=torch.int32).reshape(64, -1)  # 32 MiB, half a MiB each row
    shardckpt.save({"x": x}, tmp_path / "ck")

    def cost(index: Any) -> int:
        assert torch.equal(shardckpt.read_tensor(tmp_path / "ck", "x", index), x[index])
        return sum(n for name, n in watched[-1].inner.bytes_read.items() if name.endswith(".safetensors"))

    assert cost(10) <= (1 << 20) + 8192
    assert cost(slice(8, 16)) <= (4 << 20) + 8192
    assert cost((-1, slice(0, 100))) <= (1 << 20) + 8192
    assert cost(slice(5, 5)) == 0
