"""``overlap="step"``: the copy runs beside forward and backward, and what it saves is the state at the call."""

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import shardckpt
from gates import SECONDS, Gate, beside, gate, same
from shardckpt import Checkpointer, SaveFailedError, UsageError, checkpointer
from shardckpt.box import Box
from shardckpt.saving import overlap
from shardckpt.staging import Source, StagingPool, blocks_for
from shardckpt.state import Stepped
from shardckpt.storage import BLOCK
from storage.wrappers import FaultyStorage


class Net(nn.Module):
    """Normalised, with an embedding, and a layer that no optimizer has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.norm = nn.BatchNorm1d(24)
        self.out = nn.Conv1d(24, 5, 1).to(memory_format=torch.preserve_format)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        return self.frozen(self.out(x[..., None])[..., 0])


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def loss_of(net: nn.Module) -> Tensor:
    loss = net(torch.arange(22).reshape(-1) % 11).square().mean()
    loss.backward()
    return loss


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw-foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5),
}


def step_of(optimizer: torch.optim.Optimizer, how: str, net: nn.Module) -> Callable[[], Any]:
    """One training step less, where it has no closure, forward and backward, which have been done by then."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        return loss_of(net)

    if how == "scaler":
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))  # it has its scale from here on
        return lambda: scaler.step(optimizer)
    if how == "scheduled":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it puts a step of its own on the optimizer
    return (lambda: optimizer.step(closure)) if how in ("closure", "lbfgs") else optimizer.step


def frozen(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(([p.detach() for p in parameters], optimizer.state_dict()["state"]))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("adamw-foreach", "plain"),
        ("adamw-foreach", "closure"),
        ("adamw-fused", "plain"),
        ("adamw-fused", "scaler"),
        ("sgd-momentum", "scheduled"),
        ("lbfgs", "lbfgs"),
    ],
)
def test_a_snapshot_is_the_state_at_the_call(tmp_path: Path, name: str, how: str) -> None:
    """Buffers, an EMA model and loose values may change at once, parameters and optimizer state by a step: it waits."""
    net = Net()
    ema = copy.deepcopy(net.embed)
    optimizer = OPTIMIZERS[name](trained(net))
    loose = torch.arange(7.0)
    for _ in range(2):
        optimizer.step(lambda: loss_of(net))
    state = {"net": net, "ema": ema, "optimizer": optimizer, "loose": loose, "array": loose.numpy(), "history": [1]}
    engine = Checkpointer(overlap="step")
    engine.save(state, tmp_path / "reference")
    before = frozen(trained(net), optimizer)
    running = net.norm.running_mean.clone()
    with gate() as held:
        pending = engine.async_save(state, tmp_path / "ck")
        assert not pending.staged
        optimizer.zero_grad()
        loss_of(net)
        assert not torch.equal(running, net.norm.running_mean)
        with torch.no_grad():
            ema.weight.add_(1)
            net.frozen.weight.zero_()
        loose.zero_()
        state["history"].append(2)
        thread = beside(step_of(optimizer, how, net))
        assert held.asked.wait(SECONDS)
        assert same(before, frozen(trained(net), optimizer))
        assert not pending.done()
        held.open.set()
        thread.join()
    assert not same(before, frozen(trained(net), optimizer))
    report = pending.result()
    assert pending.staged
    assert report.stall_seconds > 0
    assert same(shardckpt.load(tmp_path / "reference"), shardckpt.load(tmp_path / "ck"))


def test_a_step_inside_backward_waits(tmp_path: Path) -> None:
    """Optimizers that step as soon as a gradient is there are held up in backward, one by one, and so is any other."""
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizers = {parameter: torch.optim.AdamW([parameter]) for parameter in net.parameters()}
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda of: optimizers[of].step())
    net(torch.ones(2, 5)).sum().backward()
    state = {"net": net, "optimizers": [*optimizers.values()]}
    engine = Checkpointer(overlap="step")
    engine.save(state, tmp_path / "reference")
    with gate() as held:
        pending = engine.async_save(state, tmp_path / "ck")
        assert not pending.staged
        thread = beside(lambda: net(torch.ones(2, 5)).sum().backward())
        assert held.asked.wait(SECONDS)
        held.open.set()
        thread.join()
    pending.result()
    assert same(shardckpt.load(tmp_path / "reference"), shardckpt.load(tmp_path / "ck"))


def test_an_optimizer_that_is_not_saved_waits_too(tmp_path: Path) -> None:
    """Two optimizers may have one parameter; the guard is on all of the process."""
    net = Net()
    saved, other = (torch.optim.AdamW(trained(net)) for _ in range(2))
    loss_of(net)
    saved.step()
    engine = Checkpointer(overlap="step")
    with gate() as held:
        pending = engine.async_save({"net": net, "optimizer": saved}, tmp_path / "ck")
        before = net.embed.weight.detach().clone()
        thread = beside(other.step)
        assert held.asked.wait(SECONDS)
        assert torch.equal(before, net.embed.weight)
        held.open.set()
        thread.join()
    pending.result()
    assert torch.equal(shardckpt.load(tmp_path / "ck")["net"]["embed.weight"], before)


@pytest.mark.parametrize(
    "make",
    [
        c
        for c in vars(torch.optim).values()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer
    ],
)
def test_torch_changes_nothing_before_the_closure(make: Any) -> None:
    """What lets forward and backward run inside a held-up step: every optimizer of torch calls the closure first."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = make([weight])
    assert type(optimizer).step.__module__.startswith("torch.optim.")
    seen: list[bool] = []

    def closure() -> Tensor:
        seen.append(all(torch.equal(live, value) for live, value in before))
        weight.grad = torch.full((4, 4), 0.5)
        if make is torch.optim.SparseAdam:
            weight.grad = weight.grad.to_sparse()
        return weight.sum()

    for _ in range(2):  # the second has state
        state = [v for v in optimizer.state[weight].values() if isinstance(v, Tensor)]
        before = [(live, live.detach().clone()) for live in (weight, *state)]
        seen.clear()
        optimizer.step(closure)
        assert seen[0]
        assert not torch.equal(*before[0])


class Early(torch.optim.SGD):
    """Perturbs its parameters before it calls the closure, as sharpness-aware optimizers do."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(2)
        return closure()


def test_a_step_of_ones_own_waits_before_it_begins(tmp_path: Path) -> None:
    """What an optimizer that is not torch's does before its closure is not known, so nothing of it is begun."""
    net = nn.Linear(3, 3)
    optimizer = Early(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    before = net.weight.detach().clone()
    called = threading.Event()
    with gate() as held:
        pending = Checkpointer(overlap="step").async_save({"net": net, "optimizer": optimizer}, tmp_path / "ck")
        thread = beside(lambda: optimizer.step(called.set))
        assert held.asked.wait(SECONDS)
        assert not called.is_set()
        assert torch.equal(before, net.weight)
        held.open.set()
        thread.join()
    assert called.is_set()
    pending.result()
    assert torch.equal(shardckpt.load(tmp_path / "ck")["net"]["weight"], before)


@pytest.mark.parametrize("whose", ("the optimizer's", "all optimizers', from before", "all optimizers', from after"))
def test_hooks_of_others_wait_too(tmp_path: Path, whose: str) -> None:
    """A hook before the step may change parameters (weight clipping), also where a closure is to run first."""
    weight = nn.Parameter(torch.ones(64))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    engine = Checkpointer(overlap="step")
    handles = []

    def halve(*_: Any) -> None:
        weight.data.mul_(0.5)

    if whose == "all optimizers', from before":
        overlap.install.cache_clear()  # as if none had been saved in this process
        hooks = torch_optimizer._global_optimizer_pre_hooks
        ours = {number: hook for number, hook in hooks.items() if hook is overlap._before_step}
        for number in ours:
            del hooks[number]
        handles.append(torch_optimizer.register_optimizer_step_pre_hook(halve))
    with gate() as held:
        pending = engine.async_save({"net": {"weight": weight}, "optimizer": optimizer}, tmp_path / "ck")
        if whose == "the optimizer's":
            handles.append(optimizer.register_step_pre_hook(halve))
        elif whose == "all optimizers', from after":
            handles.append(torch_optimizer.register_optimizer_step_pre_hook(halve))
        thread = beside(lambda: optimizer.step(lambda: torch.zeros(())))
        assert held.asked.wait(SECONDS)
        assert torch.equal(weight, torch.ones(64))
        held.open.set()
        thread.join()
    for handle in handles:
        handle.remove()
    assert torch.equal(weight, torch.full((64,), 0.5))
    pending.result()
    assert torch.equal(shardckpt.load(tmp_path / "ck")["net"]["weight"], torch.ones(64))


# -- what is not a step ---------------------------------------------------------------------------------------------


def begun(held: Gate, path: Path) -> tuple[Net, torch.optim.Optimizer, shardckpt.PendingSave]:
    """A save whose copy is under way."""
    net = Net()
    optimizer = torch.optim.AdamW(trained(net))
    loss_of(net)
    optimizer.step()
    pending = Checkpointer(overlap="step").async_save({"net": net, "optimizer": optimizer}, path)
    assert not pending.staged
    assert not held.asked.is_set()
    return net, optimizer, pending


@pytest.mark.parametrize("what", ["weight", "state", "load"])
def test_a_change_that_is_no_step_fails_the_save(tmp_path: Path, what: str) -> None:
    """Where the version counter shows it, a snapshot that may be a mixture is never committed; the error names it."""
    with gate() as held:
        net, optimizer, pending = begun(held, tmp_path / "ck")
        with torch.no_grad():
            match what:
                case "weight":
                    net.embed.weight.mul_(2)
                case "state":
                    optimizer.state[net.embed.weight]["exp_avg"].zero_()
                case "load":
                    net.load_state_dict({k: torch.zeros_like(v) for k, v in net.state_dict().items()})
        held.open.set()
    with pytest.raises(SaveFailedError, match=r"net\.embed\.weight.*wait_until_staged"):
        pending.result()
    assert not shardckpt.is_checkpoint(tmp_path / "ck")


def test_waiting_makes_any_change_safe(tmp_path: Path) -> None:
    """After `wait_until_staged` even changes that no counter shows are no part of the snapshot."""
    with gate() as held:
        net, _, pending = begun(held, tmp_path / "ck")
        assert not pending.wait_until_staged(0)
        held.open.set()
        assert pending.wait_until_staged()
        before = net.embed.weight.detach().clone()
        net.embed.weight.data.zero_()
    pending.result()
    assert torch.equal(shardckpt.load(tmp_path / "ck")["net"]["embed.weight"], before)


def test_what_forward_changes_is_copied_at_once(tmp_path: Path) -> None:
    """An embedding with ``max_norm`` is a parameter that forward itself writes to."""
    net = nn.Sequential(nn.Embedding(9, 4, max_norm=0.1), nn.Linear(4, 64))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.arange(4)).sum().backward()
    optimizer.step()
    stepped = Stepped({"net": net, "optimizer": optimizer})
    assert not stepped.holds(net[0].weight)
    assert stepped.holds(net[1].weight)
    before = net[0].weight.detach().clone()
    with gate() as held:
        pending = Checkpointer(overlap="step").async_save({"net": net, "optimizer": optimizer}, tmp_path / "ck")
        net(torch.arange(9))
        assert not torch.equal(before, net[0].weight)
        held.open.set()
    pending.result()
    assert torch.equal(shardckpt.load(tmp_path / "ck")["net"]["0.weight"], before)


def test_what_a_step_changes_is_known_by_memory() -> None:
    """Neighbours in one storage, gaps, other views and what has no version counter are told apart."""
    arena = torch.zeros(100)
    weight, gappy = nn.Parameter(arena[10:30].view(4, 5)), nn.Parameter(arena[50:90:2])
    last = nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight, gappy, last])
    with torch.inference_mode():
        optimizer.state[weight]["silent"] = torch.ones(3)
    stepped = Stepped([{"deep": optimizer}])
    assert [stepped.holds(t) for t in (weight, weight[1:], weight.detach()[:, 2], arena[10:30], last)] == [True] * 5
    outside = (arena, arena[9:12], arena[25:31], arena[30:40], gappy, arena[:0], torch.ones(3))
    assert [stepped.holds(t) for t in (*outside, optimizer.state[weight]["silent"])] == [False] * 8


class Hookless(torch.optim.SGD):
    """Does without torch's constructor, so that its step runs no hooks; wrappers of other optimizers do."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": [*parameters]}]
        self.state = {}

    def step(self, closure: Any = None) -> None: ...


def test_an_optimizer_without_hooks_guards_nothing() -> None:
    """Its parameters are copied at the call."""
    weight = nn.Parameter(torch.ones(3))
    assert not Stepped({"optimizer": Hookless([weight])}).holds(weight)


# -- when all is copied at the call ---------------------------------------------------------------------------------


def test_without_much_to_gain_it_is_the_default(tmp_path: Path) -> None:
    """No optimizer in the state, most of the state outside of it, or a limit that the rest would fill: all at once."""
    net = Net()
    optimizer = torch.optim.AdamW(trained(net))
    loss_of(net)
    optimizer.step()
    large = torch.zeros(5 << 20, dtype=torch.uint8)
    with gate() as held:
        for number, (state, limit) in enumerate(
            [
                ({"net": net}, None),
                ({"net": net, "optimizer": optimizer, "large": large}, None),
                ({"optimizer": torch.optim.SGD([nn.Parameter(large * 1.0)]), "large": large}, 8 << 20),
            ]
        ):
            engine = Checkpointer(overlap="step", staging_limit=limit)
            pending = engine.async_save(state, tmp_path / str(number))
            assert pending.staged
            pending.result()
        assert not held.asked.is_set()


def test_a_limit_holds_beside_training_too(tmp_path: Path) -> None:
    """What was copied at the call counts, and a step waits for the disk where memory is short."""
    weight = nn.Parameter(torch.arange(10.0 * (1 << 20)))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loose = torch.arange(1.0 * (1 << 20))
    weight.grad = torch.ones_like(weight)
    state = {"weight": weight, "optimizer": optimizer, "loose": loose}
    engine = Checkpointer(overlap="step", staging_limit=24 << 20)
    pending = engine.async_save(state, tmp_path / "ck")
    loose.zero_()
    optimizer.step()
    assert pending.staged
    pending.result()
    assert engine._pool.nbytes <= 24 << 20
    loaded = shardckpt.load(tmp_path / "ck")
    assert torch.equal(loaded["weight"], torch.arange(10.0 * (1 << 20)))
    assert torch.equal(loaded["loose"], torch.arange(1.0 * (1 << 20)))
    assert not torch.equal(loaded["weight"], weight)


@pytest.mark.parametrize("limit", (None, 96 << 20))
def test_what_is_copied_at_the_call_takes_no_memory_beside(tmp_path: Path, limit: int | None) -> None:
    """An average of the weights, nearly as large as they are, is copied once, to where it is written from."""
    weight = nn.Parameter(torch.arange(12.0 * (1 << 20)))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    average = torch.arange(10.0 * (1 << 20)).flip(0)
    engine = Checkpointer(overlap="step", staging_limit=limit)
    engine._pool.reserve(blocks_for(weight.nbytes + average.nbytes + BLOCK) * BLOCK)
    reserved = engine._pool.nbytes
    with gate() as held:
        state = {"weight": weight, "optimizer": optimizer, "average": average}
        pending = engine.async_save(state, tmp_path / "ck")
        assert not pending.staged
        average.zero_()
        held.open.set()
    pending.result()
    assert engine._pool.nbytes == reserved
    engine.close()
    loaded = shardckpt.load(tmp_path / "ck")
    assert torch.equal(loaded["average"], torch.arange(10.0 * (1 << 20)).flip(0))
    assert torch.equal(loaded["weight"], weight)


def test_small_tensors_all_over_the_state_touch_no_memory_at_the_call() -> None:
    """The first call of a process does not wait for memory of which its counters would fill a few bytes a block."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(1024, 2 * BLOCK >> 12), nn.BatchNorm1d(2 * BLOCK >> 12))]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sources = [
        Source(name, name, "F32", Box((0,) * value.ndim, tuple(value.shape)), value, value.nbytes)
        for name, value in net.state_dict().items()
    ]
    pool = StagingPool()
    begun = overlap.begin_overlap(sources, Stepped([optimizer]), pool, None, first_block_offset=0, threads=1)
    assert begun is not None
    assert pool.nbytes == 0
    for before, after in zip(sources, begun.sources, strict=True):
        copied = before.fqn.rsplit(".", 1)[1] in ("running_mean", "running_var", "num_batches_tracked")
        assert copied == (before.tensor.data_ptr() != after.tensor.data_ptr())
        assert torch.equal(before.tensor, after.tensor)


def test_a_limit_that_just_holds_the_shard_stops_no_step(tmp_path: Path) -> None:
    """What is copied at the call has its place in the blocks that the rest is copied to: they all fit."""
    layer = nn.Linear(2048, 12288, bias=False)  # 96 MiB, and with the header and what is loose a part of a block more
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.weight.grad = torch.ones_like(layer.weight)
    limit = blocks_for(layer.weight.nbytes + 1) * BLOCK
    engine = Checkpointer(overlap="step", staging_limit=limit)
    state = {"layer": layer, "optimizer": optimizer, "loose": torch.zeros(100)}
    for number in range(2):  # all that the second may hold has been touched by then
        pending = engine.async_save(state, tmp_path / str(number))
        saved = layer.weight.detach().clone()
        assert pending.wait_until_staged(SECONDS)
        optimizer.step()
        pending.result(SECONDS)
        engine._pool.reserve(limit)
        assert torch.equal(shardckpt.read_tensor(tmp_path / str(number), "layer.weight"), saved)
    engine.close()


def test_a_synchronous_save_needs_no_guard(tmp_path: Path) -> None:
    """`save` waits for more than the copy; it copies in the foreground as ever."""
    net = Net()
    optimizer = torch.optim.AdamW(trained(net))
    loss_of(net)
    optimizer.step()
    with gate() as held:
        Checkpointer(overlap="step").save({"net": net, "optimizer": optimizer}, tmp_path / "ck")
        assert not held.open.is_set()


@pytest.mark.parametrize("value", ["steps", True, 1])
def test_an_unknown_overlap_is_refused(value: Any) -> None:
    """A typing mistake is told at once."""
    with pytest.raises(UsageError, match="overlap is 'step' or None"):
        Checkpointer(overlap=value)


# -- when things go wrong -------------------------------------------------------------------------------------------


def test_a_copy_that_fails_holds_no_step_up(tmp_path: Path) -> None:
    """Training goes on, and whoever asks for the save is told."""
    with gate() as held:
        _, optimizer, pending = begun(held, tmp_path / "ck")
        held.error = MemoryError("no more")
        thread = beside(optimizer.step)
        assert held.asked.wait(SECONDS)
        held.open.set()
        thread.join()
    with pytest.raises(SaveFailedError, match="no more"):
        pending.result()
    assert overlap._under_way == set()


def test_a_storage_that_fails_holds_no_step_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken disk ends the copy, even one that waits for memory, and the step goes on."""
    original = checkpointer.open_storage
    broken = shardckpt.StorageError("the cable is out")
    monkeypatch.setattr(checkpointer, "open_storage", lambda *a: FaultyStorage(original(*a), "create", broken))
    weight = nn.Parameter(torch.ones(6 << 20))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    engine = Checkpointer(overlap="step", staging_limit=8 << 20)
    pending = engine.async_save({"weight": weight, "optimizer": optimizer}, tmp_path / "ck")
    optimizer.step()
    assert torch.count_nonzero(weight) == 0
    with pytest.raises(SaveFailedError, match="the cable is out"):
        pending.result()
    engine.close()


def test_ctrl_c_while_a_step_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is not begun, the copy goes on, and the save is committed."""
    with gate() as held:
        net, optimizer, pending = begun(held, tmp_path / "ck")
        before = frozen(trained(net), optimizer)

        def interrupt(self: Any, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(shardckpt.PendingSave, "wait_until_staged", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        assert same(before, frozen(trained(net), optimizer))
        held.open.set()
    pending.result()


def test_a_thread_that_cannot_be_had_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the caller copies, and has to wait for it."""
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "shardckpt-stage":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    net = Net()
    optimizer = torch.optim.AdamW(trained(net))
    loss_of(net)
    optimizer.step()
    pending = Checkpointer(overlap="step").async_save({"net": net, "optimizer": optimizer}, tmp_path / "ck")
    assert pending.staged
    pending.result()


def test_a_forked_child_has_nothing_to_wait_for(tmp_path: Path) -> None:
    """The thread that copies is not in the child, so a step there must not wait for it."""
    with gate() as held:
        _, _, pending = begun(held, tmp_path / "ck")
        child = os.fork()
        if child == 0:
            overlap.wait_for_copies()
            os._exit(0 if not held.asked.is_set() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not pending.staged
        held.open.set()
    pending.result()


EXITING = """
import sys, threading, time, torch, shardckpt
from shardckpt.staging import filling
copy = filling.copy_memory
def slow(*args):
    time.sleep(0.3)
    copy(*args)
filling.copy_memory = slow
weight = torch.nn.Parameter(torch.arange(1000.0))
optimizer = torch.optim.SGD([weight])
pending = shardckpt.async_save({"weight": weight, "optimizer": optimizer}, sys.argv[1], overlap="step")
print(pending.staged)
"""


def test_a_process_that_ends_still_copies(tmp_path: Path) -> None:
    """The last save of a script is whole, though nobody waited and its copy had hardly begun."""
    done = subprocess.run(
        [sys.executable, "-c", EXITING, str(tmp_path / "ck")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
    assert torch.equal(shardckpt.load(tmp_path / "ck")["weight"], torch.arange(1000.0))


def test_a_save_that_shares_is_staged_when_the_first_is(tmp_path: Path) -> None:
    """Two saves of one state: while the first's copy is under way, the state of the second may not change either."""
    net = Net()
    optimizer = torch.optim.AdamW(trained(net))
    loss_of(net)
    optimizer.step()
    engine, state = Checkpointer(overlap="step"), {"net": net, "optimizer": optimizer}
    with gate() as held:
        first = engine.async_save(state, tmp_path / "a", state_version=1)
        second = engine.async_save(state, tmp_path / "b", state_version=1)
        assert (first.staged, second.staged) == (False, False)
        held.open.set()
        assert second.wait_until_staged()
        assert first.staged
    assert second.result().alias
    assert same(shardckpt.load(tmp_path / "a"), shardckpt.load(tmp_path / "b"))


@pytest.mark.parametrize("opened_before", [False, True])
def test_a_load_waits_for_the_copies_of_others(tmp_path: Path, opened_before: bool) -> None:
    """Another Checkpointer's load may write into what is being copied, also of what it opened before that save."""
    other = Checkpointer()
    other.save({"net": {"embed.weight": torch.zeros(11, 24)}}, tmp_path / "zeros")
    opened = other.open(tmp_path / "zeros")
    with gate() as held:
        net, _, pending = begun(held, tmp_path / "ck")
        before = net.embed.weight.detach().clone()
        state = {"net": {"embed.weight": net.embed.weight}}
        thread = beside(lambda: opened.restore(state) if opened_before else other.load(tmp_path / "zeros", state))
        assert held.asked.wait(SECONDS)
        assert torch.equal(before, net.embed.weight)
        held.open.set()
        thread.join()
    pending.result()
    assert torch.count_nonzero(net.embed.weight) == 0
    assert torch.equal(shardckpt.load(tmp_path / "ck")["net"]["embed.weight"], before)
