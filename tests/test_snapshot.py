"""Snapshot, train, roll back, train equals train, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from autotune.snapshot import OptimizerState, Snapshot, Weights

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))
        self.register_buffer("ema", torch.zeros(1), persistent=False)
        self.register_buffer("unset", None)
        self.register_buffer("wide", torch.zeros(1).expand(4))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        out = self.body(x)
        self.ema = 0.9 * self.ema + 0.1 * out.detach().mean(0)
        return out + 0.1 * self.ema


def train(net, optimizer, steps=4):
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 3)

        def closure(x=x):
            optimizer.zero_grad()
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    return losses, {name: value.clone() for name, value in net.state_dict().items()}


def made(name, warm):
    torch.manual_seed(0)
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, warm)
    return net, optimizer


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in other) and list(one) == list(other)


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_snapshot_train_roll_back_train_equals_train(name, warm):
    plain_losses, plain_weights = train(*made(name, warm))
    net, optimizer = made(name, warm)
    parameters = list(net.parameters())
    snapshot = Snapshot.of_training(net, optimizer)
    for rounds in (1, 5):
        with snapshot.rolled_back():
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 3
            train(net, optimizer, rounds)
            snapshot.restore()
            train(net, optimizer, rounds)
    losses, weights = train(net, optimizer)
    assert losses == plain_losses
    assert same(weights, plain_weights)
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))


def test_every_kind_of_state_comes_back():
    net, optimizer = made("momentum", 2)
    ema, calls = net.ema, net.calls
    gradients = [parameter.grad for parameter in net.parameters()]
    contents = [grad.clone() for grad in gradients]
    with Snapshot.of_training(net, optimizer).rolled_back():
        train(net, optimizer, 2)
        net.body[0].weight.requires_grad_(False)
        net.body[3].bias.grad = None
        net.unset = torch.ones(1)
        net.extra = "left behind"
        net.eval()
        optimizer.param_groups[0]["momentum"] = 0.1
        optimizer.param_groups[0]["new"] = 1
    assert net.ema is ema
    assert net.calls == calls
    assert net.unset is None
    assert not hasattr(net, "extra")
    assert net.training
    assert all(part.training for part in net.modules())
    assert net.body[0].weight.requires_grad
    assert all(p.grad is grad for p, grad in zip(net.parameters(), gradients, strict=True))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), contents, strict=True))
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert "new" not in optimizer.param_groups[0]


def test_state_that_did_not_exist_is_forgotten():
    net, optimizer = made("adam", 0)
    with Snapshot.of_training(net, optimizer).rolled_back():
        train(net, optimizer, 1)
        assert optimizer.state
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_error_inside_rolls_back_too():
    net, optimizer = made("adam", 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ZeroDivisionError), Snapshot.of_training(net, optimizer).rolled_back():  # noqa: PT012
        train(net, optimizer, 1)
        raise ZeroDivisionError
    assert same(net.state_dict(), before)


def test_buffers_are_allocated_once():
    net, _ = made("adam", 1)
    weights = Weights(net)
    weights.capture()
    first = [buffer.data_ptr() for buffer in weights.copies.buffers]
    weights.capture()
    assert [buffer.data_ptr() for buffer in weights.copies.buffers] == first


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Snapshot.of_training(net, optimizer).rolled_back():
        net[1].weight = nn.Parameter(torch.zeros(3, 3))
    assert net[1].weight is net[0].weight


def test_own_hooks_are_called():
    class Hooked(nn.Linear):
        def on_trial_snapshot(self):
            return list(self.queue.queue)

        def on_trial_restore(self, saved):
            self.queue.queue = list(saved)

    class Queue:
        queue = (1,)

    net = Hooked(1, 1)
    net.queue = Queue()
    snapshot = Snapshot.of_training(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with snapshot.rolled_back():
        for _ in range(2):
            net.queue.queue = [1, 2, 3]
            snapshot.restore()
            assert net.queue.queue == [1]


def equal(got, value):
    if isinstance(value, list):
        return len(got) == len(value) and all(map(equal, got, value))
    return torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value


class TestStateDicts:
    """What a checkpoint holds of a stage's start."""

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_round_trip(self, name, tmp_path):
        net, optimizer = made(name, 3)
        weights, state = Weights(net), OptimizerState(optimizer)
        weights.capture()
        state.capture()
        expected = copy.deepcopy(optimizer.state_dict()["state"])
        start = {key: value.clone() for key, value in net.state_dict().items()}
        torch.save([weights.state_dict(), state.state_dict()], tmp_path / "saved")
        train(net, optimizer)

        saved_weights, saved_state = torch.load(tmp_path / "saved", weights_only=True)
        other, other_optimizer = made(name, 7)
        other_weights, other_state = Weights(other), OptimizerState(other_optimizer)
        other_weights.load_state_dict(saved_weights)
        other_state.load_state_dict(saved_state)
        train(other, other_optimizer, 1)
        other_weights.restore()
        other_state.restore()
        assert same(other.state_dict(), start)
        restored = other_optimizer.state_dict()["state"]
        assert restored.keys() == expected.keys()
        for index, values in expected.items():
            assert restored[index].keys() == values.keys()
            for key, value in values.items():
                assert equal(restored[index][key], value)

    def test_a_checkpoint_leaves_lists_in_a_state_as_they_are_now(self):
        net, optimizer = made("lbfgs", 3)
        state = OptimizerState(optimizer)
        state.capture()
        then = copy.deepcopy(optimizer.state_dict()["state"][0]["old_dirs"])
        train(net, optimizer, 1)
        now = copy.deepcopy(optimizer.state_dict()["state"][0]["old_dirs"])
        assert not equal(then, now)
        saved = state.state_dict()["entries"][0][2]["old_dirs"]
        assert equal(optimizer.state_dict()["state"][0]["old_dirs"], now)
        train(net, optimizer, 1)
        assert equal(saved, then)

    @pytest.mark.parametrize("hooks", [True, False])
    def test_hooks_that_came_later_go_only_where_they_belong_to_what_is_put_back(self, hooks):
        net, optimizer = made("adam", 1)
        state, calls = OptimizerState(optimizer, hooks=hooks), []
        state.capture()
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        state.restore()
        train(net, optimizer, 1)
        assert calls == ([] if hooks else ["before", "after"])

    def test_loading_copies_shares_nothing_with_the_present(self):
        net, _ = made("adam", 1)
        weights = Weights(net)
        weights.capture()
        saved = weights.state_dict()
        before = [value.clone() for value in saved]
        with torch.no_grad():
            net.body[0].weight.add_(1)
        assert all(torch.equal(one, other) for one, other in zip(saved, before, strict=True))
