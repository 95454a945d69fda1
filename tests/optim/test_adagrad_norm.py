import io
from functools import partial

import pytest
import torch
from torch import nn

from autotune.errors import ConfigurationError
from autotune.optim import AdaGradNorm


def by_definition(weights, gradients, lr, b0=0.0, eps=1e-8):
    """x - lr / b g, with b^2 the running sum of |g|^2 over all parameters, in double."""
    weights = [w.double() for w in weights]
    square = b0**2
    for step in gradients:
        square += sum(float(g.double().square().sum()) for g in step)
        weights = [w - lr / (square**0.5 + eps) * g.double() for w, g in zip(weights, step, strict=True)]
    return weights


@pytest.mark.parametrize("b0", [0.0, 2.0])
def test_equals_its_definition(b0):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(()))]
    start = [p.detach().clone() for p in parameters]
    gradients = [[torch.randn_like(p) * 10.0**s for p in parameters] for s in (0, -3, 2, 0, -1)]
    optimizer = AdaGradNorm([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.3, initial_accumulator=b0)
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, expected in zip(parameters, by_definition(start, gradients, 0.3, b0), strict=True):
        assert torch.allclose(p.double(), expected, rtol=1e-5, atol=1e-7)


def test_scaling_all_gradients_changes_nothing():
    results = []
    for factor in (1.0, 1e-6, 1e6):
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(7))
        optimizer = AdaGradNorm([p], lr=0.1, eps=1e-30)
        for _ in range(5):
            p.grad = torch.randn(7) * factor
            optimizer.step()
        results.append(p.detach())
    assert torch.allclose(results[0], results[1], rtol=1e-4)
    assert torch.allclose(results[0], results[2], rtol=1e-4)


def test_converges_on_a_quadratic_from_any_rate():
    for lr in (1.0, 10.0, 100.0):
        p = nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = AdaGradNorm([p], lr=lr)
        for _ in range(3000):
            optimizer.zero_grad()
            loss = optimizer.step(partial(_quadratic, p))
        assert loss.item() < 1e-3


def _quadratic(p):
    p.grad = None
    loss = (p.square() * torch.tensor([1.0, 5.0])).sum()
    loss.backward()
    return loss


def test_state_is_saved_in_full_precision_and_decay_is_decoupled():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdaGradNorm([p], lr=0.5, weight_decay=0.1)
    p.grad = torch.full_like(p, 0.123)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh = AdaGradNorm([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], lr=0.5)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh.accumulator, optimizer.accumulator)
    assert fresh.accumulator.dtype == torch.float64
    q = nn.Parameter(torch.ones(4))
    optimizer = AdaGradNorm([q], lr=0.5, weight_decay=0.1)
    q.grad = torch.zeros(4)
    optimizer.step()
    assert torch.allclose(q, torch.full((4,), 0.95))


def test_frozen_and_unused_parameters_are_left_alone():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdaGradNorm([unused, used], lr=1.0)
    optimizer.step()
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2))
    assert not torch.equal(used.detach(), torch.ones(2))


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"eps": 0.0}, {"initial_accumulator": -1.0}, {"weight_decay": -0.1}])
def test_bad_arguments(bad):
    with pytest.raises(ConfigurationError):
        AdaGradNorm([nn.Parameter(torch.ones(1))], **bad)
