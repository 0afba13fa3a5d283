"""Models on the meta device, which a load gives their memory."""

import copy
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardckpt
from shardckpt import CorruptCheckpointError, LoadFailedError, StateMismatchError, UsageError
from states import TinyNet, digest_of, train


class Special(nn.Parameter):
    """A Parameter of a class of its own."""


class Net(nn.Module):
    """What must survive: ties, frozen and special parameters, attributes, buffers, strides, integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.scale = Special(torch.ones(4), requires_grad=False)
        self.scale.role = "scale"
        self.turned = nn.Parameter(torch.ones(3, 4).t())
        self.register_buffer("mask", torch.ones(5, dtype=torch.bool))
        self.empty = nn.Parameter(torch.zeros(0, 3))


def on_meta(kind: Any = Net, *args: Any) -> Any:
    with torch.device("meta"):
        return kind(*args)


def filled(kind: Any = Net) -> Any:
    torch.manual_seed(5)
    model = kind()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randint(0, 2, tensor.shape) if not tensor.is_floating_point() else torch.randn(tensor.shape))
    return model


def equal(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = filled()
    shardckpt.save({"model": model}, tmp_path / "ck")
    return tmp_path / "ck", model


def test_a_meta_model_becomes_the_saved_one(saved):
    """Every tensor has its values, and is what it was: object, class, attributes, ties, strides, requires_grad."""
    path, model = saved
    live = on_meta()
    before = dict([*live.named_parameters(), *live.named_buffers()])
    strides = {name: tensor.stride() for name, tensor in before.items()}
    report = shardckpt.load(path, {"model": live})
    assert equal(live, model)
    after = dict([*live.named_parameters(), *live.named_buffers()])
    assert all(after[name] is before[name] for name in before)
    assert {name: tensor.stride() for name, tensor in after.items()} == strides
    assert live.head.weight is live.embed.weight
    assert type(live.scale) is Special
    assert live.scale.role == "scale"
    assert {n: p.requires_grad for n, p in live.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert report.left_on_meta == []
    (live.head(live.embed(torch.tensor([1, 2]))).sum() + live.turned.sum()).backward()
    assert live.embed.weight.grad is not None


def test_a_bare_meta_model_and_one_below_a_prefix(saved):
    """The same without a dict around it, with a prefix and a key map."""
    path, model = saved
    live = on_meta()
    shardckpt.load(path, live, prefix="model")
    assert equal(live, model)
    renamed = on_meta(nn.ModuleDict, {"table": nn.Embedding(7, 4, device="meta")})
    shardckpt.load(path, renamed, prefix="model.embed", key_map={"weight": "table.weight"})
    assert torch.equal(renamed["table"].weight, model.embed.weight)


def test_loading_within_the_meta_context(saved):
    """Who forgets to leave `with torch.device("meta")` gets what was asked for all the same."""
    path, model = saved
    with torch.device("meta"):
        live = Net()
        shardckpt.load(path, {"model": live})
        whole = shardckpt.load(path)
    assert equal(live, model)
    assert torch.equal(whole["model"]["embed.weight"], model.embed.weight)


@pytest.mark.parametrize("order", (("model", "optimizer"), ("optimizer", "model")))
def test_an_optimizer_made_over_meta_parameters(tmp_path, order):
    """It refers to the filled parameters, has its state beside them, and trains on as the saved one does."""
    model, optimizer = train(1, 3, ddp=False)
    state = {"model": model, "optimizer": optimizer}
    shardckpt.save(state, tmp_path / "ck")
    live = on_meta(TinyNet)
    theirs = torch.optim.AdamW(live.parameters())
    resumed = {"model": live, "optimizer": theirs}
    shardckpt.load(tmp_path / "ck", {key: resumed[key] for key in order})
    assert digest_of(resumed) == digest_of(state)
    assert {p.device.type for group in theirs.param_groups for p in group["params"]} == {"cpu"}
    assert all(value.device.type == "cpu" for s in theirs.state.values() for value in s.values())
    for net, opt in ((model, optimizer), (live, theirs)):
        opt.zero_grad()
        net(torch.arange(6).reshape(2, 3)).sum().backward()
        opt.step()
    assert digest_of(resumed) == digest_of(state)


def test_optimizer_state_that_is_on_meta_is_made_anew(tmp_path):
    """A copy on the meta device of an optimizer with state gets that state with memory."""
    model, optimizer = train(1, 2, ddp=False)
    shardckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "ck")
    live = on_meta(TinyNet)
    theirs = torch.optim.AdamW(live.parameters())
    for p in live.parameters():
        theirs.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}
    shardckpt.load(tmp_path / "ck", {"model": live, "optimizer": theirs})
    assert digest_of({"model": live, "optimizer": theirs}) == digest_of({"model": model, "optimizer": optimizer})


def test_an_optimizer_whose_parameters_stay_on_meta(tmp_path):
    """Its state has data, where torch.load would put it."""
    model, optimizer = train(1, 2, ddp=False)
    shardckpt.save({"optimizer": optimizer}, tmp_path / "ck")
    live = on_meta(TinyNet)
    theirs = torch.optim.AdamW(live.parameters())
    report = shardckpt.load(tmp_path / "ck", {"optimizer": theirs})
    for ours, saved in zip(live.parameters(), model.parameters(), strict=True):
        assert torch.equal(theirs.state[ours]["exp_avg"], optimizer.state[saved]["exp_avg"])
    assert report.left_on_meta == []


def test_meta_tensors_in_plain_containers(tmp_path):
    """Tensors of a dict, a list and a tuple, a shared one once, and a Parameter."""
    state = {"x": torch.arange(4.0), "l": [torch.ones(2), (torch.zeros(3),)], "p": torch.full((2,), 3.0)}
    shardckpt.save(state | {"y": state["x"]}, tmp_path / "ck")
    shared = torch.empty(4, device="meta")
    live = {
        "x": shared,
        "y": shared,
        "l": [torch.empty(2, device="meta"), (torch.empty(3, device="meta"),)],
        "p": nn.Parameter(torch.empty(2, device="meta")),
    }
    shardckpt.load(tmp_path / "ck", live)
    assert live["x"] is live["y"] is shared
    assert torch.equal(shared, state["x"])
    assert torch.equal(live["l"][0], state["l"][0])
    assert torch.equal(live["l"][1][0], state["l"][1][0])
    assert torch.equal(live["p"], state["p"])
    assert isinstance(live["p"], nn.Parameter)


@pytest.mark.parametrize("where", ("meta", {"cpu": "meta"}))
def test_map_location_says_where(saved, where):
    """A meta model stays one if map_location sends it there, and the report says so."""
    path, _ = saved
    live = on_meta()
    report = shardckpt.load(path, {"model": live}, map_location=where)
    assert {tensor.device.type for tensor in live.state_dict().values()} == {"meta"}
    assert "model.embed.weight" in report.left_on_meta


def test_optimizer_state_goes_where_its_parameter_goes(tmp_path):
    """State of a parameter that map_location moves is beside it, and a step counter stays on the CPU."""
    model, optimizer = train(1, 2, ddp=False)
    shardckpt.save({"optimizer": optimizer, "model": model}, tmp_path / "ck")
    live = on_meta(TinyNet)
    theirs = torch.optim.AdamW(live.parameters())
    # The first tensor that is asked for is the model's: what the optimizer has is not asked for at all.
    shardckpt.load(
        tmp_path / "ck", {"optimizer": theirs, "model": live}, map_location=lambda storage, _: to_meta(storage)
    )
    for state in theirs.state.values():
        assert {key: value.device.type for key, value in state.items()} == {
            "step": "cpu",
            "exp_avg": "meta",
            "exp_avg_sq": "meta",
        }


def to_meta(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return torch.UntypedStorage(storage.nbytes(), device="meta")


def test_map_location_as_a_function_gets_each_tensor_once(saved):
    """It is called with the storage of each distinct tensor, and what it returns is used."""
    path, model = saved
    live = on_meta()
    seen = []

    def elsewhere(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        seen.append((storage.nbytes(), tag))
        return storage.clone()

    shardckpt.load(path, {"model": live}, map_location=elsewhere)
    assert equal(live, model)
    assert len(seen) == len({id(t) for t in [*live.parameters(), *live.buffers()]})


def test_missing_tensors_stay_on_meta_and_are_reported(saved, caplog):
    """strict=False fills what there is; whoever goes on is told what has no data."""
    path, model = saved
    live = on_meta()
    live.extra = nn.Linear(2, 2, device="meta")
    live.norm = nn.BatchNorm1d(5, device="meta")
    with pytest.raises(StateMismatchError, match=r"model\.extra\.weight"):
        shardckpt.load(path, {"model": live})
    assert all(tensor.is_meta for tensor in live.state_dict().values())
    with caplog.at_level(logging.WARNING, "shardckpt"):
        report = shardckpt.load(path, {"model": live}, strict=False)
    left = {f"model.{name}" for name, tensor in live.state_dict().items() if tensor.is_meta}
    assert set(report.left_on_meta) == left == {
        "model.extra.weight", "model.extra.bias", "model.norm.weight", "model.norm.bias", "model.norm.running_mean",
        "model.norm.running_var"}  # fmt: skip
    assert "model.extra.weight" in caplog.text
    assert torch.equal(live.embed.weight, model.embed.weight)
    assert "left_on_meta" in repr(report)


def test_buffers_that_are_not_persistent_are_named(tmp_path, caplog):
    """No checkpoint holds them, so a model that needs one is not silently wrong."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("angles", torch.ones(3), persistent=False)

    shardckpt.save({"m": Rotary()}, tmp_path / "ck")
    live = on_meta(Rotary)
    with caplog.at_level(logging.WARNING, "shardckpt"):
        report = shardckpt.load(tmp_path / "ck", {"m": live})
    assert report.left_on_meta == ["m.angles"]
    assert "m.angles" in caplog.text
    assert "not persistent" in caplog.text.replace("\n", " ")
    assert not live.weight.is_meta


def test_what_cannot_stay_the_same_object_is_refused_beforehand(saved):
    """Weak references, hooks and recorded graphs would be left with the old tensor."""
    path, _ = saved
    for spoil, reason in (
        (weakref.ref, "weak reference"),
        (lambda p: p.register_hook(lambda grad: grad), "autograd"),
        (lambda p: p.register_post_accumulate_grad_hook(lambda p: None), "autograd"),
        (lambda p: p.expand_as(p), "autograd"),
    ):
        live = on_meta()
        kept = spoil(live.embed.weight)
        with pytest.raises(
            StateMismatchError, match=rf"model\.embed\.weight: on the meta device, and {reason}|{reason}"
        ):
            shardckpt.load(path, {"model": live})
        assert all(tensor.is_meta for tensor in live.state_dict().values())
        assert kept is not None


@pytest.mark.parametrize("fault", ("missing", "damaged", "location"))
def test_nothing_changes_on_failure(saved, fault, monkeypatch):
    """A model stays on meta, whatever goes wrong; and for files that are not there, no memory is taken."""
    path, _ = saved
    (shard,) = path.glob("*.safetensors")
    where = None
    if fault == "missing":
        shard.unlink()
        monkeypatch.setattr(shardckpt.state.matching, "like", lambda *_: pytest.fail("allocated"))
    elif fault == "damaged":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    else:
        where = "cuda:7"
    live = on_meta()
    error = LoadFailedError if fault == "location" else CorruptCheckpointError
    with pytest.raises(error) as caught:
        shardckpt.load(path, {"model": live}, map_location=where)
    assert "Nothing was changed" in str(caught.value) or fault == "missing"
    assert all(tensor.is_meta for tensor in [*live.parameters(), *live.buffers()])


def test_loading_hooks_see_tensors_with_data(tmp_path):
    """A module that has loading code of its own gets its memory first, and what that code fills is filled."""

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(2, 3))
            self.kept = nn.Parameter(torch.full((2,), 4.0))

    class New(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.zeros(2, 3))
            self.kept = nn.Parameter(torch.zeros(2))
            self.register_load_state_dict_pre_hook(self._rename)

        @staticmethod
        def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
            if f"{prefix}a" in state_dict:
                state_dict[f"{prefix}b"] = state_dict.pop(f"{prefix}a")

    shardckpt.save({"m": Old()}, tmp_path / "ck")
    live = on_meta(New)
    b = live.b
    report = shardckpt.load(tmp_path / "ck", {"m": live})
    assert live.b is b
    assert torch.equal(live.b, torch.ones(2, 3))
    assert torch.equal(live.kept, torch.full((2,), 4.0))
    assert report.left_on_meta == []


def test_loading_code_that_cannot_be_asked(tmp_path):
    """Where nobody can know whether a tensor will be filled, the remedy is named and nothing is changed."""

    class Wild(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            if any(tensor.is_meta for tensor in state_dict.values()):
                raise RuntimeError("no tensor without data, please")
            super()._load_from_state_dict(state_dict, prefix, *args)

    shardckpt.save({"m": nn.ParameterDict({"other": torch.ones(2)})}, tmp_path / "ck")
    live = on_meta(Wild)
    with pytest.raises(StateMismatchError, match=r"m\.w: on the meta device.*to_empty"):
        shardckpt.load(tmp_path / "ck", {"m": live})
    assert live.w.is_meta


def test_a_compiled_meta_model(saved):
    """torch.compile's wrapper changes names, not the model."""
    path, model = saved
    live = on_meta()
    shardckpt.load(path, {"model": torch.compile(live, backend="eager")})
    assert equal(live, model)


def test_other_dtypes_and_shapes_are_judged_as_ever(saved):
    """Being on meta excuses no difference; convert_dtype converts."""
    path, model = saved
    live = on_meta().half()
    with pytest.raises(StateMismatchError, match="convert_dtype=True"):
        shardckpt.load(path, {"model": live})
    shardckpt.load(path, {"model": live}, convert_dtype=True)
    assert live.turned.dtype is torch.half
    assert torch.equal(live.turned, model.turned.half())


def test_a_state_without_data_is_still_not_saved(tmp_path):
    """A meta model has nothing to save; the message says what gives it data."""
    with pytest.raises(UsageError, match=r"Load a checkpoint into it, or materialise it"):
        shardckpt.save({"model": on_meta()}, tmp_path / "ck")


def test_modules_and_copies_stay_usable(saved):
    """A filled model can be copied, moved and saved again."""
    path, model = saved
    live = on_meta()
    shardckpt.load(path, {"model": live})
    assert equal(copy.deepcopy(live), model)
    shardckpt.save({"model": live}, path)
    assert equal(live.to(torch.float32), model)
    assert isinstance(live.turned, Tensor)


class Padded(nn.Module):
    """A module whose state dict shows a parameter otherwise than it is."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(rows, 3))
        self.second = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.register_state_dict_post_hook(_pad)


def _pad(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    first = state_dict[prefix + "first"]
    state_dict[prefix + "first"] = torch.cat([first, torch.full((2, 3), 5.0, device=first.device)])


@pytest.mark.parametrize("rows", [0, 4])
def test_what_a_state_dict_shows_otherwise_is_not_materialised(tmp_path: Path, rows: int) -> None:
    """A meta parameter cannot become what a hook makes of it; and its neighbours never get its bytes."""
    shardckpt.save({"model": Padded(rows)}, tmp_path / "ck")
    with torch.device("meta"):
        model = Padded(rows)
    with pytest.raises(StateMismatchError, match=r"model\.first: of shape .* materialise it first"):
        shardckpt.load(tmp_path / "ck", {"model": model})
    assert model.first.is_meta
    assert model.second.is_meta
