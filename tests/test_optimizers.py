"""Optimizers: never stepped, restored by parameter name, and going on bit for bit as if nothing had happened."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardckpt
from shardckpt import StateMismatchError
from states import bits

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

MAKERS: dict[str, Make] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "adamw foreach amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=True, amsgrad=True),
    "adam fused": lambda ps: torch.optim.Adam(ps, lr=1e-2, fused=True),
    "adam tensor lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(1e-2)),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2),
    "sgd momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, centered=True, momentum=0.5),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=1e-2, max_iter=3),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=1e-2),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=1e-2),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=1e-2),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-2),
    "adagrad fused": lambda ps: torch.optim.Adagrad(ps, lr=1e-2, fused=True),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1e-2),
}


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(module.parameters()).dtype
    for step in steps:
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)

        def closure(inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = module(inputs).float().square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def never_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """From here on, until the handle is removed, a step fails the test."""

    def stepped(*_: Any) -> None:
        pytest.fail("the optimizer was stepped")

    optimizer.handle = optimizer.register_step_pre_hook(stepped)  # type: ignore[attr-defined]
    return optimizer


def contents(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything that decides how training goes on, to the bit."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return str(value.dtype), tuple(value.shape), bits(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    parameters = [bits(parameter) for parameter in module.parameters()]
    return [parameters, plain(optimizer.state_dict())]


@pytest.mark.parametrize("trained", [True, False], ids=["into trained", "into fresh"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_training_goes_on_bit_for_bit(tmp_path, make, trained):
    """Five steps, save, load, five steps are ten steps; and neither saving nor loading steps an optimizer."""
    module = model()
    optimizer = make(list(module.parameters()))
    train(module, optimizer, range(5))
    never_step(optimizer)
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    optimizer.handle.remove()
    saved = contents(module, optimizer)
    train(module, optimizer, range(5, 10))
    expected = contents(module, optimizer)

    module = model(1)
    optimizer = make(list(module.parameters()))
    if trained:
        train(module, optimizer, range(20, 23))
    never_step(optimizer)
    shardckpt.load(tmp_path / "ck", {"model": module, "optimizer": optimizer})
    optimizer.handle.remove()
    assert contents(module, optimizer) == saved
    train(module, optimizer, range(5, 10))
    assert contents(module, optimizer) == expected


def test_live_state_is_read_in_place(tmp_path):
    """State that an optimizer has already costs no second allocation."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    saved = contents(module, optimizer)
    pointers = [optimizer.state[p]["exp_avg"].data_ptr() for p in module.parameters()]
    train(module, optimizer, range(2, 4))
    shardckpt.load(tmp_path / "ck", {"model": module, "optimizer": optimizer})
    assert [optimizer.state[p]["exp_avg"].data_ptr() for p in module.parameters()] == pointers
    assert contents(module, optimizer) == saved


def test_an_optimizer_without_state(tmp_path):
    """Nothing stepped yet is nothing stored; loading it makes a stepped optimizer forget."""
    module = model()
    fresh = never_step(torch.optim.AdamW(module.parameters(), lr=0.5))
    shardckpt.save({"model": module, "optimizer": fresh}, tmp_path / "ck")
    assert not fresh.state
    other = model(1)
    optimizer = torch.optim.AdamW(other.parameters())
    train(other, optimizer, range(2))
    shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": optimizer})
    assert not any(optimizer.state.get(p) for p in other.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_bf16_parameters_keep_float32_state(tmp_path):
    """State in another dtype than its parameter is restored bit for bit, also beside hooks; torch would cast it."""

    class Float32State(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            if closure is not None:
                with torch.enable_grad():
                    closure()
            for group in self.param_groups:
                for p in group["params"]:
                    master = self.state[p].setdefault("master", p.float())
                    master.sub_(p.grad.float(), alpha=group["lr"])
                    p.copy_(master)

    module = model(dtype=torch.bfloat16)
    optimizer = Float32State(module.parameters(), lr=1e-3)
    train(module, optimizer, range(3))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    told = []
    for hooked in (False, True):
        other = model(1, dtype=torch.bfloat16)
        restored = Float32State(other.parameters(), lr=1)
        if hooked:
            restored.register_load_state_dict_post_hook(lambda _: told.append("post"))
        shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored})
        assert contents(other, restored) == contents(module, optimizer)
    assert told == ["post"]


def groups_of(module: nn.Module, order: list[int], lrs: dict[int, float]) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    groups = {0: parameters[:2], 1: parameters[2:3], 2: [], 3: parameters[3:]}
    return [{"params": groups[number], "lr": lrs[number], "betas": (0.5 + number / 10, 0.9)} for number in order]


LRS = {0: 0.1, 1: 0.01, 2: 0.001, 3: 0.2}


def test_param_groups_keep_their_own_options(tmp_path):
    """Several groups, an empty one among them, each get back their own learning rate and betas."""
    module = model()
    optimizer = torch.optim.AdamW(groups_of(module, [0, 1, 2, 3], LRS))
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    other = model(1)
    restored = torch.optim.AdamW(groups_of(other, [0, 1, 2, 3], dict.fromkeys(LRS, 1.0)))
    shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored})
    assert contents(other, restored) == contents(module, optimizer)


def test_param_groups_in_another_order(tmp_path):
    """State and options find their parameters by name, wherever these are now."""
    module = model()
    optimizer = torch.optim.AdamW(groups_of(module, [0, 1, 3], LRS))
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    other = model(1)
    restored = torch.optim.AdamW(groups_of(other, [3, 0, 1], dict.fromkeys(LRS, 1.0)))
    shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored})
    assert [group["lr"] for group in restored.param_groups] == [0.2, 0.1, 0.01]
    assert [group["betas"][0] for group in restored.param_groups] == [0.8, 0.5, 0.6]
    train(module, optimizer, range(2, 5))
    train(other, restored, range(2, 5))
    assert list(map(bits, module.parameters())) == list(map(bits, other.parameters()))


def test_param_groups_split_and_reordered(tmp_path):
    """Each part of a group that has been split goes on with the group's options; empty groups stand where they like."""
    module = model()
    weights, biases = list(module.parameters())[::2], list(module.parameters())[1::2]
    optimizer = torch.optim.AdamW([{"params": weights, "lr": 0.5}, {"params": biases}, {"params": [], "lr": 0.7}])
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    other = model(1)
    parts: list[list[nn.Parameter]] = [list(other.parameters())[3:0:-2], [], [other[2].weight], [], [other[0].weight]]
    restored = torch.optim.AdamW([{"params": part, "lr": 9.0 + n} for n, part in enumerate(parts)])
    shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored})
    # There was one empty group; the second one keeps what it has.
    assert [group["lr"] for group in restored.param_groups] == [1e-3, 0.7, 0.5, 12.0, 0.5]
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert {k: bits(v) for k, v in restored.state[b].items()} == {k: bits(v) for k, v in optimizer.state[a].items()}


def test_param_groups_merged(tmp_path):
    """One group can't have the options of two: a load says in what they differ, or takes those of most parameters."""
    for rates in ((0.1, 0.2), (0.3, 0.3)):
        module = model()
        first, *rest = module.parameters()
        optimizer = torch.optim.AdamW([{"params": [first], "lr": rates[0]}, {"params": rest, "lr": rates[1]}])
        train(module, optimizer, range(2))
        shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / str(rates))
        other = model(1)
        before = [bits(parameter) for parameter in other.parameters()]
        restored = torch.optim.AdamW(other.parameters(), lr=9.0)
        state = {"model": other, "optimizer": restored}
        if rates[0] != rates[1]:
            with pytest.raises(
                StateMismatchError, match=r"param_groups\.0: one group here, groups 0, 1 .* differ in lr;"
            ):
                shardckpt.load(tmp_path / str(rates), state)
            assert [bits(parameter) for parameter in other.parameters()] == before
            assert restored.param_groups[0]["lr"] == 9.0
        report = shardckpt.load(tmp_path / str(rates), state, strict=False)
        assert len(report.mismatched) == (rates[0] != rates[1])
        assert restored.param_groups[0]["lr"] == rates[1]
        assert bits(restored.state[other[0].weight]["exp_avg"]) == bits(optimizer.state[first]["exp_avg"])


class Tied(nn.Module):
    """Two weights, or one."""

    def __init__(self, tied: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.b(self.a(inputs))


@pytest.mark.parametrize("stepped", [False, True])
def test_tied_weights_are_untied_with_their_state(tmp_path, stepped):
    """Both weights go on from the shared one's state, each with its own from there."""
    module = Tied(True, 0)
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    for live in (Tied(True, 1), Tied(False, 1)):
        restored = torch.optim.AdamW(live.parameters(), lr=1.0)
        if stepped:
            train(live, restored, range(1))
        shardckpt.load(tmp_path / "ck", {"model": live, "optimizer": restored})
        expected = {key: bits(value) for key, value in optimizer.state[module.a.weight].items()}
        for weight in live.parameters():
            assert bits(weight) == bits(module.a.weight)
            assert {key: bits(value) for key, value in restored.state[weight].items()} == expected
        pointers = [value.data_ptr() for state in restored.state.values() for value in state.values()]
        assert len(set(pointers)) == len(pointers) == 3 * len(list(live.parameters()))
        assert restored.param_groups[0]["lr"] == 1e-3


def test_weights_tied_since_are_refused_or_take_the_first(tmp_path):
    """Two values for one memory: a strict load names both; without it value and state come from one of them."""
    module = Tied(False, 0)
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    live = Tied(True, 1)
    before = bits(live.a.weight)
    restored = torch.optim.AdamW(live.parameters())
    with pytest.raises(StateMismatchError, match=r"model\.b\.weight: one memory with 'model\.a\.weight' here"):
        shardckpt.load(tmp_path / "ck", {"model": live, "optimizer": restored})
    assert (bits(live.a.weight), len(restored.state)) == (before, 0)
    report = shardckpt.load(tmp_path / "ck", {"model": live, "optimizer": restored}, strict=False)
    assert report.unexpected == ["optimizer.param_groups: model.b.weight"]
    assert bits(live.a.weight) == bits(module.a.weight)
    assert bits(restored.state[live.a.weight]["exp_avg"]) == bits(optimizer.state[module.a.weight]["exp_avg"])


def test_state_of_a_parameter_that_changed_its_shape(tmp_path):
    """It is refused like the parameter, by name and with both shapes; never put where the next step would fail."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    other = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    restored = torch.optim.AdamW(other.parameters())
    message = r"optimizer\.state: model\.0\.weight: of a parameter of shape \(8, 5\) here, \(7, 5\) in the checkpoint"
    with pytest.raises(StateMismatchError, match=message):
        shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored})
    shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored}, strict=False)
    assert bits(restored.state[other[2].bias]["exp_avg"]) == bits(optimizer.state[module[2].bias]["exp_avg"])
    train(other, restored, range(2))


def test_state_by_place_is_not_for_a_parameter_of_another_shape(tmp_path):
    """Without the module, order alone says which parameter is meant: one of another shape is not."""
    module = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False))
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, range(1))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    restored = torch.optim.AdamW([*module.parameters()][::-1])
    with pytest.raises(
        StateMismatchError, match=r"param_groups\.0\.1: of a parameter of shape \(7, 5\) here, \(3, 7\)"
    ):
        shardckpt.load(tmp_path / "ck", {"optimizer": restored})
    assert not restored.state


def test_parameters_saved_without_state_lose_theirs(tmp_path):
    """Frozen when it was saved: whatever a parameter has gathered since is gone, as if that time had never been."""
    module = model()
    module[0].requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    other = model(1)
    restored = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    train(other, restored, range(2))
    shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored})
    assert contents(other, restored) == contents(module, optimizer)
    assert sorted(restored.state_dict()["state"]) == [2, 3]


@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), nn.DataParallel], ids=["compiled", "wrapped"]
)
def test_names_do_not_know_of_wrappers(tmp_path, wrap):
    """State saved of a compiled or wrapped module is that of the module, and the reverse; of parts of it too."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, range(2))
    parts = model(2)
    parts[0] = wrap(parts[0])
    for number, (saved, live) in enumerate([(wrap(module), model(1)), (module, wrap(model(1))), (module, parts)]):
        shardckpt.save({"model": saved, "optimizer": optimizer}, tmp_path / str(number))
        restored = torch.optim.AdamW(live.parameters())
        shardckpt.load(tmp_path / str(number), {"model": live, "optimizer": restored})
        assert contents(live, restored) == contents(module, optimizer)


@pytest.mark.parametrize("saved", [{"fused": True}, {"foreach": True}, {"amsgrad": True}, {}], ids=str)
@pytest.mark.parametrize("live", [{"fused": True}, {"foreach": True}, {"amsgrad": True}, {}], ids=str)
def test_options_that_choose_an_implementation_come_along(tmp_path, saved, live):
    """As with torch's own state dicts, whose result this is compared with; and the next step works."""
    module = model()
    optimizer = torch.optim.Adam(module.parameters(), **saved)
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    ours, theirs = model(1), model(1)
    restored, expected = (torch.optim.Adam(one.parameters(), **live) for one in (ours, theirs))
    shardckpt.load(tmp_path / "ck", {"model": ours, "optimizer": restored})
    theirs.load_state_dict(module.state_dict())
    expected.load_state_dict(optimizer.state_dict())
    assert contents(ours, restored) == contents(theirs, expected)
    train(ours, restored, range(2))
    train(theirs, expected, range(2))
    assert contents(ours, restored) == contents(theirs, expected)


def test_odd_kinds_of_state(tmp_path):
    """Steps that are numbers, state for sparse gradients and for matrices alone: back as they were."""
    module = model()
    adam = torch.optim.AdamW(module.parameters())
    train(module, adam, range(2))
    table = nn.Embedding(5, 4, sparse=True)
    sparse = torch.optim.SparseAdam(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    sparse.step()
    matrix = nn.Linear(5, 5, bias=False)
    muon = torch.optim.Muon(matrix.parameters())
    train(matrix, muon, range(2))
    shardckpt.save({"m": [module, table, matrix], "o": [adam, sparse, muon]}, tmp_path / "ck")
    others = [model(1), nn.Embedding(5, 4, sparse=True), nn.Linear(5, 5, bias=False)]
    restored = [
        torch.optim.AdamW(others[0].parameters()),
        torch.optim.SparseAdam(others[1].parameters()),
        torch.optim.Muon(others[2].parameters()),
    ]
    shardckpt.load(tmp_path / "ck", {"m": others, "o": restored})
    for one, two, mine, theirs in zip(others, [module, table, matrix], restored, [adam, sparse, muon], strict=True):
        assert contents(one, mine) == contents(two, theirs)
    assert type(restored[1].state[others[1].weight]["step"]) is int


def test_lbfgs_forgets_and_keeps_lists(tmp_path):
    """Its nested lists come back as lists into a fresh one, and a fresh one saved makes a stepped one forget."""
    module = model()
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=3)
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "fresh")
    train(module, optimizer, range(1))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "stepped")
    other = model(1)
    restored = torch.optim.LBFGS(other.parameters(), max_iter=3)
    shardckpt.load(tmp_path / "stepped", {"model": other, "optimizer": restored})
    state = restored.state[other[0].weight]
    assert type(state["old_dirs"]) is list
    assert state["func_evals"] == optimizer.state[module[0].weight]["func_evals"] > 0
    shardckpt.load(tmp_path / "fresh", {"model": other, "optimizer": restored})
    assert restored.state_dict()["state"] == {}


def test_a_plain_state_dict_of_another_structure(tmp_path):
    """Known by index alone, it can't be told apart: refused with the group and both counts, and nothing changed."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.3)
    train(module, optimizer, range(2))
    shardckpt.save({"optimizer": optimizer.state_dict()}, tmp_path / "ck")
    halves = torch.optim.AdamW([{"params": module[0].parameters()}, {"params": module[2].parameters()}])
    with pytest.raises(StateMismatchError, match=r"param_groups\.0: 2 parameters here, 4 in the checkpoint"):
        shardckpt.load(tmp_path / "ck", {"optimizer": halves})
    assert halves.param_groups[0]["lr"] == 1e-3
    assert not halves.state


def test_an_optimizer_that_gives_no_state_is_named(tmp_path):
    """Like a ZeroRedundancyOptimizer before it has been consolidated: where it stands, and its own words."""

    class Scattered(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("call consolidate_state_dict first")

    state = {"optimizers": [Scattered(model().parameters())]}
    with pytest.raises(shardckpt.UnserialisableError, match=r"Scattered at 'optimizers\.0'.*consolidate_state_dict"):
        shardckpt.save(state, tmp_path / "ck")
    assert not (tmp_path / "ck").exists()


def test_parameters_outside_every_module_go_by_place(tmp_path):
    """Loose parameters are keyed by group and index, and a module's beside them by name."""

    def make(seed: int) -> tuple[nn.Module, list[nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(seed)
        module, loose = nn.Linear(2, 2), [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(()))]
        optimizer = torch.optim.Adam([{"params": [loose[0], *module.parameters()]}, {"params": loose[1:], "lr": 0.5}])
        return module, loose, optimizer

    module, loose, optimizer = make(0)
    for parameter in [*module.parameters(), *loose]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    shardckpt.save({"model": module, "loose": loose, "optimizer": optimizer}, tmp_path / "ck")
    other, others, restored = make(1)
    shardckpt.load(tmp_path / "ck", {"model": other, "loose": others, "optimizer": restored})
    assert contents(other, restored) == contents(module, optimizer)
    assert list(map(bits, others)) == list(map(bits, loose))


def test_an_optimizer_without_its_module_beside_it(tmp_path):
    """Whether or not the module is part of the saved or of the live state, the optimizer finds its parameters."""
    module = model()
    optimizer = torch.optim.AdamW(groups_of(module, [0, 1, 2, 3], LRS))
    train(module, optimizer, range(2))
    expected = contents(module, optimizer)[1]
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "both")
    shardckpt.save({"optimizer": optimizer}, tmp_path / "alone")
    shardckpt.save(optimizer, tmp_path / "bare")
    for name in ("both", "alone", "bare"):
        other = model(1)
        restored = torch.optim.AdamW(groups_of(other, [0, 1, 2, 3], dict.fromkeys(LRS, 1.0)))
        target: Any = restored if name == "bare" else {"optimizer": restored}
        shardckpt.load(tmp_path / name, target)
        assert contents(other, restored)[1] == expected
        if name == "alone":
            again = torch.optim.AdamW(groups_of(other, [0, 1, 2, 3], dict.fromkeys(LRS, 1.0)))
            shardckpt.load(tmp_path / name, {"model": other, "optimizer": again}, strict=False)
            assert contents(other, again)[1] == expected


def test_a_plain_state_dict_restores_a_live_optimizer_and_the_reverse(tmp_path):
    """`opt.state_dict()` saved as a value goes into a live optimizer by order, as torch has it; and out again."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.3)
    train(module, optimizer, range(3))
    shardckpt.save({"optimizer": optimizer.state_dict()}, tmp_path / "plain")
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "live")
    other = model(1)
    restored = torch.optim.AdamW(other.parameters())
    shardckpt.load(tmp_path / "plain", {"model": other, "optimizer": restored}, strict=False)
    assert contents(other, restored)[1] == contents(module, optimizer)[1]
    for name in ("plain", "live"):
        restored = torch.optim.AdamW(other.parameters())
        restored.load_state_dict(shardckpt.load(tmp_path / name)["optimizer"])
        assert contents(other, restored)[1] == contents(module, optimizer)[1]
        target = {"optimizer": restored.state_dict()}
        for state in target["optimizer"]["state"].values():
            state["exp_avg"].zero_()
        shardckpt.load(tmp_path / name, target)
        assert contents(other, restored)[1] == contents(module, optimizer)[1]


def test_added_and_removed_parameters(tmp_path):
    """A strict load names them; without it what is known is restored, and what is new keeps what it has."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.3)
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    other = model(1)
    other.append(nn.Linear(3, 3))
    restored = torch.optim.AdamW(other.parameters())
    train(other, restored, range(2))
    own = bits(restored.state[other[3].weight]["exp_avg"])
    with pytest.raises(StateMismatchError, match=r"optimizer\.param_groups: model\.3\.weight"):
        shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored})
    report = shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored}, strict=False)
    assert "optimizer.param_groups: model.3.weight" in report.missing
    assert bits(restored.state[other[0].weight]["exp_avg"]) == bits(optimizer.state[module[0].weight]["exp_avg"])
    assert bits(restored.state[other[3].weight]["exp_avg"]) == own
    assert restored.param_groups[0]["lr"] == 0.3
    fewer = model(2)[:1]
    least = torch.optim.AdamW(fewer.parameters())
    report = shardckpt.load(tmp_path / "ck", {"model": fewer, "optimizer": least}, strict=False)
    assert report.unexpected == [
        "model.2.weight",
        "model.2.bias",
        "optimizer.param_groups: model.2.weight",
        "optimizer.param_groups: model.2.bias",
    ]
    train(other, restored, range(2, 3))


def test_several_optimizers_and_frozen_parameters(tmp_path):
    """Each optimizer of a list has its own state for its own parameters; frozen ones have none."""

    def make(seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        module = model(seed)
        module[2].bias.requires_grad_(False)
        first = torch.optim.AdamW(module[0].parameters())
        return module, [first, torch.optim.SGD(module[2].parameters(), lr=0.1, momentum=0.5)]

    module, optimizers = make(0)
    train(module, optimizers[0], range(2))
    train(module, optimizers[1], range(2))
    shardckpt.save({"model": module, "optimizers": optimizers}, tmp_path / "ck")
    other, restored = make(1)
    shardckpt.load(tmp_path / "ck", {"model": other, "optimizers": restored})
    for a, b in zip(optimizers, restored, strict=True):
        assert contents(other, b) == contents(module, a)
    assert module[2].bias not in optimizers[1].state or not optimizers[1].state[module[2].bias]


def test_two_modules_whose_parameters_have_one_name(tmp_path):
    """Modules at "a" and "a.b" both have an "a.b.weight"; their optimizer state is not confused."""

    def make(value: float) -> tuple[dict[str, Any], list[nn.Parameter]]:
        first, second = nn.ModuleDict({"b": nn.Linear(1, 1, bias=False)}), nn.Linear(1, 1, bias=False)
        parameters = [first["b"].weight, second.weight]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.full((1, 1), value + i)
        optimizer.step()
        return {"a": first, "a.b": second, "optimizer": optimizer}, parameters

    state, parameters = make(1.0)
    live, others = make(5.0)
    shardckpt.save(state, tmp_path / "ck")
    shardckpt.load(tmp_path / "ck", live)
    for a, b in zip(parameters, others, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(
            state["optimizer"].state[a]["momentum_buffer"], live["optimizer"].state[b]["momentum_buffer"]
        )


class Wrapping(torch.optim.Optimizer):
    """An optimizer around another, with a state dict of its own form."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        self.count = state_dict["count"]


class Counting(torch.optim.SGD):
    """Torch's form with more in it, and its own code to read it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"more": {"loads": self.loads, "t": torch.ones(2)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert torch.equal(state_dict["more"]["t"], torch.ones(2))
        self.loads = state_dict["more"]["loads"] + 1
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


def test_optimizers_with_code_of_their_own(tmp_path):
    """Their state_dict and load_state_dict are called, whatever form they give their state."""
    module = model()
    wrapping = Wrapping(torch.optim.AdamW(module.parameters()))
    counting = Counting(module.parameters(), lr=0.1, momentum=0.5)
    train(module, wrapping, range(2))
    train(module, counting, range(2))
    shardckpt.save({"model": module, "wrapping": wrapping, "counting": counting}, tmp_path / "ck")
    other = model(1)
    wrapped = Wrapping(torch.optim.AdamW(other.parameters()))
    counted = Counting(other.parameters(), lr=1)
    shardckpt.load(tmp_path / "ck", {"model": other, "wrapping": wrapped, "counting": counted})
    assert wrapped.count == 2
    assert contents(other, wrapped.inner) == contents(module, wrapping.inner)
    assert counted.loads == 1
    assert bits(counted.state[other[0].weight]["momentum_buffer"]) == bits(
        counting.state[module[0].weight]["momentum_buffer"]
    )
    assert counted.param_groups[0]["lr"] == 0.1


def test_load_hooks_of_optimizers(tmp_path):
    """A pre-hook may change the state dict, a post-hook hears of the load."""
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    train(module, optimizer, range(2))
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    told = []

    def pre(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        told.append(sorted(state_dict))
        return state_dict | {"param_groups": [group | {"lr": 0.7} for group in state_dict["param_groups"]]}

    restored = torch.optim.SGD(module.parameters(), lr=1)
    restored.register_load_state_dict_pre_hook(pre)
    restored.register_load_state_dict_post_hook(lambda _: told.append("post"))
    shardckpt.load(tmp_path / "ck", {"model": module, "optimizer": restored})
    assert told == [["param_groups", "state"], "post"]
    assert restored.param_groups[0]["lr"] == 0.7
    assert restored.state[module[0].weight]["momentum_buffer"].any()


def test_state_that_is_no_parameters(tmp_path):
    """Global state under a key of its own, and tensors that several parameters share."""

    class Shared(torch.optim.SGD):
        pass

    module = model()
    optimizer = Shared(module.parameters(), lr=0.1)
    clock = torch.zeros(())
    for parameter in module.parameters():
        optimizer.state[parameter]["clock"] = clock
    optimizer.state["global"]["best"] = torch.tensor(3.0)
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    other = model(1)
    restored = Shared(other.parameters(), lr=0.1)
    shardckpt.load(tmp_path / "ck", {"model": other, "optimizer": restored})
    assert restored.state["global"]["best"] == 3
    restored.state[other[0].weight]["clock"].add_(1)
    assert [restored.state[p]["clock"].item() for p in other.parameters()] == [1.0] * 4


def schedulers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    lr = torch.optim.lr_scheduler
    return {
        "step": lr.StepLR(optimizer, 3),
        "lambda": lr.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        "multiplicative": lr.MultiplicativeLR(optimizer, lambda _: 0.9),
        "cosine": lr.CosineAnnealingLR(optimizer, 20),
        "restarts": lr.CosineAnnealingWarmRestarts(optimizer, 3),
        "plateau": lr.ReduceLROnPlateau(optimizer, patience=1),
        "one cycle": lr.OneCycleLR(optimizer, 0.1, total_steps=30),
        "cyclic": lr.CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=False),
        "multi": lr.MultiStepLR(optimizer, [2, 4]),
        "chained": lr.ChainedScheduler([lr.ConstantLR(optimizer), lr.ExponentialLR(optimizer, 0.9)]),
        "sequential": lr.SequentialLR(optimizer, [lr.LinearLR(optimizer), lr.StepLR(optimizer, 2)], [3]),
    }


@pytest.mark.parametrize("name", schedulers(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)))
def test_schedulers_continue(tmp_path, name):
    """Every scheduler of torch goes on with the learning rates of the uninterrupted run, and needs no pickle."""

    def make() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, schedulers(optimizer)[name]

    def go(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if name == "plateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, scheduler = make()
    go(optimizer, scheduler, 4)
    shardckpt.save({"optimizer": optimizer, "scheduler": scheduler}, tmp_path / "ck")
    expected = go(optimizer, scheduler, 6)
    optimizer, scheduler = make()
    shardckpt.load(tmp_path / "ck", {"optimizer": optimizer, "scheduler": scheduler})
    assert go(optimizer, scheduler, 6) == expected


class Stateful:
    """A data loader, a scaler, a metric: anything with the two methods."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "t": torch.full((2,), 1.5)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert torch.equal(state_dict["t"], torch.full((2,), 1.5))
        self.value = state_dict["value"]


def test_other_stateful_objects(tmp_path):
    """They are asked and told through their two methods, at the root, in containers and inside each other."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    state = {"a": Stateful(5), "list": [Stateful({"x": (1, 2)})], "scaler": scaler, "outer": Stateful([1])}
    shardckpt.save(state, tmp_path / "ck")
    live = {"a": Stateful(0), "list": [Stateful(0)], "scaler": torch.amp.GradScaler("cpu"), "outer": Stateful(0)}
    objects = [*live.values(), live["list"][0]]
    shardckpt.load(tmp_path / "ck", live)
    assert [*live.values(), live["list"][0]] == objects
    assert live["a"].value == 5
    assert live["list"][0].value == {"x": (1, 2)}
    assert live["scaler"].state_dict() == scaler.state_dict()
    shardckpt.save(Stateful(7), tmp_path / "bare")
    bare = Stateful(0)
    shardckpt.load(tmp_path / "bare", bare)
    assert bare.value == 7


def test_a_stateful_object_that_holds_itself_is_refused(tmp_path):
    """Endless state is an error with a path, not a stack overflow."""

    class Endless(Stateful):
        def state_dict(self) -> dict[str, Any]:
            return {"next": self}

    with pytest.raises(shardckpt.UnserialisableError, match=r"e\.next"):
        shardckpt.save({"e": Endless(1)}, tmp_path / "ck")


def test_param_names_stay_the_live_ones(tmp_path):
    """An optimizer made with named parameters keeps their names."""
    module = model()
    optimizer = torch.optim.SGD(module.named_parameters(), lr=0.1)
    shardckpt.save({"model": module, "optimizer": optimizer}, tmp_path / "ck")
    restored = torch.optim.SGD([(f"my.{name}", p) for name, p in module.named_parameters()], lr=1)
    shardckpt.load(tmp_path / "ck", {"model": module, "optimizer": restored})
    assert restored.param_groups[0]["param_names"][0] == "my.0.weight"
    assert restored.param_groups[0]["lr"] == 0.1


def test_another_kind_of_optimizer_is_a_mismatch(tmp_path):
    """AdamW's state says nothing to SGD: it is not taken in pieces, nor its learning rate without its moments."""
    model = torch.nn.Linear(2, 2)
    adam = torch.optim.AdamW(model.parameters(), lr=0.005)
    model(torch.ones(2)).sum().backward()
    adam.step()
    shardckpt.save({"model": model, "optimizer": adam}, tmp_path / "ck")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(shardckpt.StateMismatchError, match=r"optimizer\.param_groups\.0: .*betas.*no .*momentum.*SGD"):
        shardckpt.load(tmp_path / "ck", {"model": model, "optimizer": sgd})
    report = shardckpt.load(tmp_path / "ck", {"model": model, "optimizer": sgd}, strict=False)
    assert len(report.mismatched) == 1
    assert not sgd.state
    assert sgd.param_groups[0]["lr"] == 0.1
    assert "betas" not in sgd.param_groups[0]


def test_options_that_schedulers_and_releases_add_are_no_other_kind(tmp_path):
    """A scheduler's own options, and those of a relative of the same hyperparameters, are taken as ever."""
    model = torch.nn.Linear(2, 2)
    adam = torch.optim.AdamW(model.parameters(), lr=0.005)
    torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=0.1, total_steps=10)
    for group in adam.param_groups:
        del group["decoupled_weight_decay"]  # as an older torch has it
    shardckpt.save({"model": model, "optimizer": adam}, tmp_path / "ck")
    fresh = torch.optim.AdamW(model.parameters())
    assert not shardckpt.load(tmp_path / "ck", {"model": model, "optimizer": fresh}).mismatched
    assert fresh.param_groups[0]["max_lr"] == 0.1
    relative = torch.optim.Adam(model.parameters())
    assert not shardckpt.load(tmp_path / "ck", {"model": model, "optimizer": relative}).mismatched
