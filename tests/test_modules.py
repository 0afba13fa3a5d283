"""Modules: saved and restored through their own state_dict/load_state_dict, and changed only if all of it fits."""

from typing import Any

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import StateMismatchError
from states import TinyNet, bits


def contents(module: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    model.train()
    for _ in range(seed + 1):
        model(torch.randn(5, 3, 4, 4))
    return model


def test_a_bare_module_is_a_state(tmp_path):
    """A module by itself is saved and restored in place, buffers and all."""
    model, other = net(0), net(1)
    shardckpt.save(model, tmp_path / "ck")
    pointers = [tensor.data_ptr() for tensor in other.state_dict().values()]
    report = shardckpt.load(tmp_path / "ck", other)
    assert contents(other) == contents(model)
    assert [tensor.data_ptr() for tensor in other.state_dict().values()] == pointers
    assert sorted(report.restored) == sorted(model.state_dict())


def test_a_state_dict_restores_a_module_and_the_reverse(tmp_path):
    """`{"model": model}` and `{"model": model.state_dict()}` are one format on either side."""
    model = net(0)
    shardckpt.save({"model": model}, tmp_path / "module")
    shardckpt.save({"model": model.state_dict()}, tmp_path / "dict")
    shardckpt.save({"model": dict(model.state_dict())}, tmp_path / "plain")
    for name in ("module", "dict", "plain"):
        other = net(1)
        shardckpt.load(tmp_path / name, {"model": other})
        assert contents(other) == contents(model)
        other = net(1)
        shardckpt.load(tmp_path / name, {"model": other.state_dict()})
        assert contents(other) == contents(model)
        other = net(1)
        other.load_state_dict(shardckpt.load(tmp_path / name)["model"])
        assert contents(other) == contents(model)


class Upgrading(nn.Module):
    """A module whose version 2 doubled its weight, and that still loads version 1."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.seen: list[Any] = []

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        self.seen.append(local_metadata.get("version"))
        if local_metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_versions_reach_the_modules_own_loading_code(tmp_path):
    """A module is told the version that was saved, whether a module, a state dict or a wrapped module was."""
    model = nn.ModuleDict({"inner": Upgrading()})
    with torch.no_grad():
        model["inner"].weight.fill_(1)
    states = {"module": model, "dict": model.state_dict(), "wrapped": torch.compile(model, backend="eager")}
    for name, state in states.items():
        shardckpt.save({"model": state}, tmp_path / name)
        for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
            other = nn.ModuleDict({"inner": Upgrading()})
            shardckpt.load(tmp_path / name, {"model": wrap(other)})
            assert other["inner"].seen == [2]
            assert torch.equal(other["inner"].weight, torch.ones(3))
        assert shardckpt.load(tmp_path / name)["model"]._metadata["inner"]["version"] == 2
    model["inner"]._version = 1
    shardckpt.save({"model": model}, tmp_path / "old")
    shardckpt.load(tmp_path / "old", {"model": other})
    assert torch.equal(other["inner"].weight, torch.full((3,), 2.0))


class Transposing(nn.Module):
    """Keeps its weight turned round in state dicts, through hooks that share its memory and hooks that don't."""

    def __init__(self, copy: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("scale", torch.ones(2))
        self._register_state_dict_hook(self._save_hook)
        self._register_load_state_dict_pre_hook(self._load_hook)
        self.copy = copy

    def _save_hook(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        weight = state_dict[prefix + "weight"].t()
        state_dict[prefix + "weight"] = weight.clone() if self.copy else weight
        state_dict[prefix + "scale"] = state_dict[prefix + "scale"] * 100

    def _load_hook(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"].t()
        state_dict[prefix + "scale"] = state_dict[prefix + "scale"] / 100


@pytest.mark.parametrize("copy", [True, False])
def test_hooks_that_transform_values_are_honoured(tmp_path, copy):
    """What a state-dict hook made is stored, and what a load hook makes of it is restored."""
    model, other = Transposing(copy), Transposing(copy)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(2, 3))
        model.scale.fill_(3)
    shardckpt.save({"model": model}, tmp_path / "ck")
    assert shardckpt.load(tmp_path / "ck")["model"]["weight"].shape == (3, 2)
    assert shardckpt.load(tmp_path / "ck")["model"]["scale"].tolist() == [300, 300]
    shardckpt.load(tmp_path / "ck", {"model": other})
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.scale, model.scale)


class WithExtra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"n": 1, "t": [1, (2, 3)]}, 5, None, "text"], ids=str)
def test_extra_state_is_saved_and_set(tmp_path, extra):
    """get_extra_state and set_extra_state work with plain values of any shape, deep in a model."""
    shardckpt.save({"model": nn.ModuleList([WithExtra(extra)])}, tmp_path / "ck")
    other = nn.ModuleList([WithExtra("old")])
    shardckpt.load(tmp_path / "ck", {"model": other})
    assert other[0].extra == extra


def test_extra_state_that_is_a_tensor(tmp_path):
    """An extra tensor is no parameter: it is handed over, not read into somebody's memory."""
    mine = torch.zeros(3)
    shardckpt.save({"model": WithExtra(torch.arange(3.0))}, tmp_path / "ck")
    other = WithExtra(mine)
    shardckpt.load(tmp_path / "ck", {"model": other})
    assert torch.equal(other.extra, torch.arange(3.0))


def test_wrapped_and_plain_restore_each_other(tmp_path):
    """torch.compile's prefix is no part of a name, at the top or around a submodule."""
    model, other = net(0), net(1)
    shardckpt.save({"model": torch.compile(model, backend="eager")}, tmp_path / "wrapped")
    shardckpt.load(tmp_path / "wrapped", {"model": other})
    assert contents(other) == contents(model)
    shardckpt.save({"model": model}, tmp_path / "plain")
    other = net(1)
    other[4] = torch.compile(other[4], backend="eager")
    shardckpt.load(tmp_path / "plain", {"model": torch.compile(other, backend="eager")})
    assert list(contents(other).values()) == list(contents(model).values())


def test_names_that_a_wrapper_would_make_one_are_refused(tmp_path):
    """Two tensors never share a name in silence."""
    model = nn.Module()
    model.inner = torch.compile(nn.Linear(1, 1), backend="eager")
    model.inner.register_buffer("_weight", torch.zeros(1))
    model._orig_mod = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(shardckpt.UsageError, match="both called 'weight'"):
        shardckpt.save({"model": model}, tmp_path / "ck")


def test_a_lazy_module_takes_its_shape_from_the_checkpoint(tmp_path):
    """load_state_dict materialises a lazy module, so that a load does too."""
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    model(torch.ones(2, 5))
    shardckpt.save({"model": model}, tmp_path / "ck")
    other = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    shardckpt.load(tmp_path / "ck", {"model": other})
    assert contents(other) == contents(model)


def test_parametrizations(tmp_path):
    """weight_norm's originals are restored in place, and its weight follows from them; old names load too."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    shardckpt.save({"model": model}, tmp_path / "ck")
    other = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    shardckpt.load(tmp_path / "ck", {"model": other})
    assert contents(other) == contents(model)
    assert torch.equal(other.weight, model.weight)
    old = {"weight_g": torch.ones(2, 1), "weight_v": torch.eye(2, 3), "bias": torch.ones(2)}
    shardckpt.save({"model": old}, tmp_path / "old")
    shardckpt.load(tmp_path / "old", {"model": other})
    assert torch.equal(other.weight, torch.eye(2, 3))
    assert torch.equal(other.bias, torch.ones(2))


def test_frozen_parameters_and_unsaved_buffers(tmp_path):
    """What needs no gradient is restored all the same; a buffer that is not persistent is neither saved nor missed."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)
            self.register_buffer("cache", torch.rand(3), persistent=False)
            self.register_buffer("nothing", None)

    model, other = Model(), Model()
    cache = other.cache.clone()
    shardckpt.save({"model": model}, tmp_path / "ck")
    shardckpt.load(tmp_path / "ck", {"model": other})
    assert torch.equal(other.frozen, model.frozen)
    assert not other.frozen.requires_grad
    assert torch.equal(other.cache, cache)


def test_tied_weights_are_stored_once(tmp_path):
    """A tied head costs no bytes, is restored in place, and loads into a model that unties it."""
    model = TinyNet()
    shardckpt.save({"model": model}, tmp_path / "ck")
    stored = sum(file.stat().st_size for file in (tmp_path / "ck").glob("*.safetensors"))
    assert stored < sum(p.nbytes for p in model.parameters()) + 10_000
    other = TinyNet()
    other.head.weight = nn.Parameter(torch.zeros(97, 64))
    shardckpt.load(tmp_path / "ck", {"model": other})
    assert torch.equal(other.head.weight, model.embed.weight)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert other.head.weight.data_ptr() != other.embed.weight.data_ptr()
    loaded = shardckpt.load(tmp_path / "ck")["model"]
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()


class Renamed(nn.Module):
    """A module that was once called otherwise, and whose pre-hook knows."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.new = nn.Linear(width, 2)
        self.other = nn.Linear(2, 2)
        self._register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}old.{name}" in state_dict:
                state_dict[f"{prefix}new.{name}"] = state_dict.pop(f"{prefix}old.{name}")


def old_names(width: int = 3) -> nn.Module:
    return nn.ModuleDict({"old": nn.Linear(width, 2), "other": nn.Linear(2, 2)})


def test_old_names_are_loaded_by_the_modules_own_hook(tmp_path):
    """A pre-hook that renames keys is asked before anything is called missing."""
    model = old_names()
    shardckpt.save({"model": model, "deep": nn.ModuleDict({"m": model})}, tmp_path / "ck")
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        other, deep = Renamed(), Renamed()
        state = {"model": wrap(other), "deep": nn.ModuleDict({"m": wrap(deep)})}
        report = shardckpt.load(tmp_path / "ck", state)
        assert list(contents(other).values()) == list(contents(model).values())
        assert list(contents(deep).values()) == list(contents(model).values())
        assert not report.missing
        assert not report.unexpected


@pytest.mark.parametrize("fault", ["width", "more", "less"])
def test_a_hook_that_cannot_help_changes_nothing(tmp_path, fault):
    """Loading code that renames is rehearsed, so that a strict load still fails before it changes a byte."""
    model = old_names(4 if fault == "width" else 3)
    if fault == "more":
        model["extra"] = nn.Linear(1, 1)
    if fault == "less":
        del model["other"]
    shardckpt.save({"model": model, "n": 1}, tmp_path / "ck")
    other = Renamed()
    before = contents(other)
    with pytest.raises(StateMismatchError, match={"width": "new.weight", "more": "extra.weight"}.get(fault, "other")):
        shardckpt.load(tmp_path / "ck", {"model": other, "n": 0})
    assert contents(other) == before


def test_what_old_versions_lacked_is_completed(tmp_path):
    """A BatchNorm from before it counted its batches loads, as it does into torch's own load_state_dict."""
    model = net(0)
    old = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    shardckpt.save({"model": old}, tmp_path / "ck")
    other, expected = net(1), net(1)
    expected.load_state_dict(old)
    report = shardckpt.load(tmp_path / "ck", {"model": other})
    assert contents(other) == contents(expected)
    assert not report.missing
    with pytest.raises(StateMismatchError, match=r"missing from the checkpoint: model\.5\.weight"):
        shardckpt.load(tmp_path / "ck", {"model": nn.Sequential(*net(1), nn.Linear(4, 4))})


def damaged_pair() -> tuple[nn.Module, nn.Module]:
    saved = nn.ModuleDict(
        {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "only_saved": nn.Linear(1, 1), "d": nn.Linear(2, 2)}
    )
    live = nn.ModuleDict(
        {"a": nn.Linear(3, 2), "b": nn.Linear(4, 2), "only_live": nn.Linear(1, 1), "d": nn.Linear(2, 2)}
    )
    live["d"].half()
    return saved, live


def test_strict_names_every_difference_and_changes_nothing(tmp_path):
    """One error has all of it: shapes, dtypes, missing and unexpected names of modules, tensors and top-level keys."""
    saved, live = damaged_pair()
    shardckpt.save({"model": saved, "t": torch.ones(2), "v": 5, "n": 1, "x": torch.ones(1)}, tmp_path / "ck")
    before = contents(live)
    state: dict[str, Any] = {
        "model": live,
        "t": torch.zeros(3),
        "v": torch.zeros(1),
        "n": 0,
        "lost": 1,
        "x": torch.zeros(1),
    }
    with pytest.raises(StateMismatchError) as raised:
        shardckpt.load(tmp_path / "ck", state)
    for line in (
        "model.b.weight: shape (2, 4) here, (2, 3) in the checkpoint",
        "model.d.weight: dtype float16 here, float32 in the checkpoint (convert_dtype=True converts)",
        "model.d.bias: dtype",
        "missing from the checkpoint: model.only_live.weight",
        "missing from the checkpoint: model.only_live.bias",
        "missing from the checkpoint: lost",
        "in the checkpoint only: model.only_saved.weight",
        "t: shape (3,) here, (2,) in the checkpoint",
        "v: a tensor here, but a plain value in the checkpoint",
        "nothing has been changed",
    ):
        assert line in str(raised.value)
    assert contents(live) == before
    assert state["n"] == 0
    assert state["x"].item() == 0


def test_not_strict_restores_what_matches_and_reports_the_rest(tmp_path):
    """strict=False has load_state_dict's meaning, with the report for what load_state_dict returns."""
    saved, live = damaged_pair()
    shardckpt.save({"model": saved, "n": 1, "more": 2}, tmp_path / "ck")
    before = contents(live)
    state = {"model": live, "n": 0, "lost": 7}
    report = shardckpt.load(tmp_path / "ck", state, strict=False)
    after = contents(live)
    assert {name for name in after if after[name] != before[name]} == {"a.weight", "a.bias", "b.bias"}
    assert torch.equal(live["a"].weight, saved["a"].weight)
    assert report.missing == ["model.only_live.weight", "model.only_live.bias", "lost"]
    assert report.unexpected == ["model.only_saved.weight", "model.only_saved.bias"]
    assert [line.partition(":")[0] for line in report.mismatched] == [
        "model.b.weight",
        "model.d.weight",
        "model.d.bias",
    ]
    assert report.skipped == ["more"]
    assert state["n"] == 1
    assert state["lost"] == 7


def test_convert_dtype_converts_when_asked(tmp_path):
    """A float32 checkpoint fills a bf16 model and the reverse, but half a complex number is never thrown away."""
    model = nn.Linear(3, 2)
    shardckpt.save({"model": model, "z": torch.ones(2, dtype=torch.complex64)}, tmp_path / "ck")
    other = nn.Linear(3, 2).bfloat16()
    shardckpt.load(tmp_path / "ck", {"model": other}, convert_dtype=True)
    assert torch.equal(other.weight, model.weight.bfloat16())
    assert other.weight.dtype is torch.bfloat16
    live = {"model": nn.Linear(3, 2), "z": torch.zeros(2)}
    before = contents(live["model"])
    with pytest.raises(StateMismatchError, match="z: dtype float32 here, complex64"):
        shardckpt.load(tmp_path / "ck", live, convert_dtype=True)
    assert contents(live["model"]) == before
    wide = {"z": torch.zeros(2, dtype=torch.complex128)}
    shardckpt.load(tmp_path / "ck", wide, convert_dtype=True)
    assert wide["z"].tolist() == [1, 1]


def test_a_module_with_loading_code_of_its_own(tmp_path):
    """An overridden load_state_dict is called, once, with everything."""
    calls = []

    class Model(nn.Linear):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(sorted(state_dict))
            return super().load_state_dict(state_dict, *args, **kwargs)

    model = Model(2, 2)
    shardckpt.save(model, tmp_path / "ck")
    other = Model(2, 2)
    shardckpt.load(tmp_path / "ck", other)
    assert calls == [["bias", "weight"]]
    assert contents(other) == contents(model)


def test_post_hooks_run(tmp_path):
    """A hook that wants to know of a load is told."""
    told = []
    model = nn.Linear(2, 2)
    shardckpt.save(model, tmp_path / "ck")
    model.register_load_state_dict_post_hook(lambda module, keys: told.append(keys.missing_keys))
    shardckpt.load(tmp_path / "ck", model)
    assert told == [[]]


def test_modules_in_lists_and_one_module_under_two_keys(tmp_path):
    """A module is found wherever the state keeps it, and stored once however often."""
    model, second = nn.Linear(300, 200), nn.Linear(2, 2)
    shardckpt.save({"list": [model, (second,)], "again": {"m": model}}, tmp_path / "ck")
    stored = sum(file.stat().st_size for file in (tmp_path / "ck").glob("*.safetensors"))
    assert stored < model.weight.nbytes + 20_000
    live = [nn.Linear(300, 200), (nn.Linear(2, 2),)]
    modules = [live[0], live[1][0]]
    shardckpt.load(tmp_path / "ck", {"list": live, "again": {"m": live[0]}})
    assert [live[0], live[1][0]] == modules
    assert contents(live[0]) == contents(model)
    assert contents(live[1][0]) == contents(second)


def test_include_and_exclude(tmp_path):
    """Patterns choose what is saved: leaves by name, containers with all that is in them; nothing empty is left."""
    model = nn.ModuleDict({"base": nn.Linear(2, 2), "lora": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(model.parameters())
    model["lora"](model["base"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "step": 3, "log": {"a": [1, 2]}, "pair": (torch.ones(1), 5)}

    def saved(**options: Any) -> Any:
        shardckpt.save(state, tmp_path / "ck", **options)
        return shardckpt.load(tmp_path / "ck")

    loaded = saved(include=["model.lora.*"])
    assert list(loaded) == ["model"]
    assert list(loaded["model"]) == ["lora.weight", "lora.bias"]
    assert list(saved(include=["*lora*"])) == ["model", "optimizer"]
    assert list(saved(include=["model", "step"])) == ["model", "step"]
    assert list(saved(exclude=["optimizer", "log", "pair.*"])) == ["model", "step"]
    assert saved(exclude=["optimizer*", "pair.0"])["pair"] == (None, 5)
    assert saved(include=["log"]) == {"log": {"a": [1, 2]}}
    assert list(saved(exclude=["*.base.*"])["model"]) == ["lora.weight", "lora.bias"]
    with pytest.raises(shardckpt.UsageError, match="nothing"):
        saved(include=["nothing.*"])


def test_adapters_alone_leave_the_rest_of_a_live_state_alone(tmp_path):
    """Loading adapters into a full state changes the adapters, and no optimizer forgets anything."""
    model = nn.ModuleDict({"base": nn.Linear(2, 2), "lora": nn.Linear(2, 2)})
    shardckpt.save({"model": model}, tmp_path / "ck", include=["*lora*"])
    other = nn.ModuleDict({"base": nn.Linear(2, 2), "lora": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other["lora"](other["base"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    before, momentum = contents(other), bits(optimizer.state[other["lora"].weight]["momentum_buffer"])
    report = shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": optimizer}, strict=False)
    after = contents(other)
    assert {name for name in after if after[name] != before[name]} == {"lora.weight", "lora.bias"}
    assert after["lora.weight"] == contents(model)["lora.weight"]
    assert report.missing == ["model.base.weight", "model.base.bias", "optimizer"]
    assert bits(optimizer.state[other["lora"].weight]["momentum_buffer"]) == momentum
