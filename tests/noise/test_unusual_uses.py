"""What users do to layers beside calling them: the estimate is exact for what it covers, and the rest has a name."""

import types
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from autotune.noise.parameters import ParameterSet
from autotune.noise.per_example import PerExampleMeter
from tests.noise.twins import variance

N = 9


class Made(nn.Module):
    """A model of some parts and a function of them."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def with_penalty_and_accuracy(model, x, y):
    model(x).argmax(1)  # a pass that is not back-propagated
    return entropy(model, x, y) + 0.1 * sum(parameter.square().sum() for parameter in model.parameters())


def with_other_weights(model, x, y):
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    return F.cross_entropy(functional_call(model, doubled, (x,)), y)


def with_batch_statistics(model, x, y):
    return F.cross_entropy(model[1](F.batch_norm(model[0](x), None, None, training=True)), y)


def two_layers():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))


def scaled_output():
    model = two_layers()
    model[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
    return model


def replaced_forward():
    model = two_layers()
    model[0].forward = types.MethodType(lambda self, x: F.linear(2 * x, self.weight, self.bias), model[0])
    return model


def masked_gradient():
    model, mask = two_layers(), torch.rand(6, 6).round()
    model[0].weight.register_hook(lambda gradient: gradient * mask)
    return model


def named_arguments():
    def forward(m, x):
        return m.head(input=m.norm(x=torch.tanh(m.body(input=x))))  # each layer has its own name for it

    return Made(forward, body=nn.Linear(6, 6), norm=nn.RMSNorm(6), head=nn.Linear(6, 3))


def written_over():
    """The output of a layer with positions and bias is a view: written over, it never sees its gradient."""
    return Made(
        lambda m, x: m.head(m.body(torch.relu_(m.body(x))).tanh().mean(1)), body=nn.Linear(4, 4), head=nn.Linear(4, 3)
    )


def in_a_checkpoint_and_outside():
    def forward(m, x):
        return m.head(checkpoint(lambda h: torch.tanh(m.body(h)), torch.tanh(m.body(x)), use_reentrant=True))

    return Made(forward, body=nn.Linear(6, 6), head=nn.Linear(6, 3))


def by_hand_too():
    return Made(
        lambda m, x: m.head(torch.tanh(F.linear(m.body(x), m.body.weight))), body=nn.Linear(6, 6), head=nn.Linear(6, 3)
    )


def twice():
    return Made(lambda m, x: m.head(torch.tanh(m.body(m.body(x)))), body=nn.Linear(6, 6), head=nn.Linear(6, 3))


def positions():
    """As many positions as examples."""

    def forward(m, x):
        return m.head(torch.tanh(m.table(x) + m.positions(torch.arange(x.shape[1]))).mean(1))

    return Made(forward, table=nn.Embedding(7, 8), positions=nn.Embedding(N, 8), head=nn.Linear(8, 3))


def learned(layer, *shape):
    def forward(m, x):
        return m.head(m.body(x) + m.layer(m.query).reshape(N, -1).mean(0).sum())

    return Made(
        forward, body=nn.Linear(6, 6), layer=layer, head=nn.Linear(6, 3), query=nn.Parameter(torch.randn(shape))
    )


def parametrized_attention():
    def forward(m, x):
        return m.head(m.attention(*[m.body(x)] * 3)[0].mean(1))

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    weight_norm(attention.out_proj)
    return Made(forward, body=nn.Linear(4, 8), attention=attention, head=nn.Linear(8, 3))


def sparse():
    return Made(lambda m, x: m.head(torch.tanh(m.body(x.to_sparse()))), body=nn.Linear(6, 6), head=nn.Linear(6, 3))


def complex_numbers():
    body = nn.Linear(6, 8, dtype=torch.complex64)
    return Made(lambda m, x: m.head(m.body(x.to(torch.complex64)).abs()), body=body, head=nn.Linear(8, 3))


def unused():
    return Made(lambda m, x: m.head(x), other=nn.Linear(20, 20), head=nn.Linear(6, 3))


FLAT, ROWS, WORDS = (N, 6), (N, 5, 4), "words"
#: Model, input, loss, and what is left out (the beginning of its name) with a word of the reason.
CASES = {
    "group norm without positions": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(4, 8), nn.Linear(8, 3)), FLAT,
                                     entropy, {}),
    "a hook on the output": (scaled_output, FLAT, entropy, {}),
    "named arguments": (named_arguments, FLAT, entropy, {}),
    "used twice": (twice, FLAT, entropy, {}),
    "not used": (unused, FLAT, entropy, {}),
    "another forward": (replaced_forward, FLAT, entropy, {"0": "no use"}),
    "a hook on the weight": (masked_gradient, FLAT, entropy, {"0.weight": "hook"}),
    "a penalty and a pass for nothing": (two_layers, FLAT, with_penalty_and_accuracy, {"": "without its layer"}),
    "other weights": (two_layers, FLAT, with_other_weights, {"": "no use"}),
    "batch statistics by hand": (two_layers, FLAT, with_batch_statistics, {"": "neighbours"}),
    "written over": (written_over, ROWS, entropy, {"body": "without its layer"}),
    "in a checkpoint and outside": (in_a_checkpoint_and_outside, FLAT, entropy, {"body": ""}),
    "by hand too": (by_hand_too, FLAT, entropy, {"body.weight": "without its layer"}),
    "as many positions as examples": (positions, WORDS, entropy, {"positions": "counts positions"}),
    "a learned table": (lambda: learned(nn.Linear(4, 6), N, 4), FLAT, entropy, {"layer": "a parameter", "query": ""}),
    "a learned vector": (lambda: learned(nn.Linear(N, N), N), FLAT, entropy, {"layer": "a parameter", "query": ""}),
    "a parametrized part of attention": (parametrized_attention, ROWS, entropy, {"attention": "no use"}),
    "sparse": (sparse, FLAT, entropy, {"body": "sparse"}),
    "complex": (complex_numbers, FLAT, entropy, {"body": "complex"}),
}  # fmt: skip


def measured(model, x, y, step, around=nullcontext):
    meter = PerExampleMeter(model, ParameterSet.of(model))
    meter.begin()
    meter.attach()
    with around():
        loss = step(model, x, y)
    meter.arm(N, loss)
    loss.backward()
    meter.end_chunk(N)
    return meter


def twin(model, x, y, step, names):
    rows = []
    for i in range(N):
        model.zero_grad()
        step(model, x[i : i + 1], y[i : i + 1]).backward()
        kept = [parameter for name, parameter in model.named_parameters() if name in names]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in kept]
        rows.append(torch.cat([grad.double().flatten() for grad in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_what_is_covered_is_exact_and_the_rest_has_a_name(case):
    torch.manual_seed(0)
    make, shape, step, left_out = CASES[case]
    model, y = make(), torch.randint(3, (N,))
    x = torch.randint(7, (N, N)) if shape == WORDS else torch.randn(shape)
    meter = measured(model, x, y, step)
    excluded = meter.coverage().excluded
    for begins, reason in left_out.items():
        found = [name for name in excluded if name.startswith(begins)]
        assert found
        assert all(reason in excluded[name] for name in found), excluded
    assert all(name.startswith(tuple(left_out)) for name in excluded), excluded
    kept = {name for name, p in model.named_parameters() if p.grad is not None} - set(excluded)
    assert (meter.coverage().share > 0) == bool(kept)
    if kept:
        # The others' gradients are read from the batch, whose queries and layers are as they were.
        record = meter.close()
        rows = twin(model, x, y, step, kept)
        assert float(record.variance()) == pytest.approx(variance(rows), rel=1e-5)


@pytest.mark.parametrize(("make", "left_out"), [(by_hand_too, {"body.weight"}), (twice, set())])
def test_under_autocast_a_use_of_the_kept_copy_is_a_use_of_the_parameter(make, left_out):
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(FLAT), torch.randint(3, (N,))
    meter = measured(model, x, y, entropy, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert set(meter.coverage().excluded) == left_out


def test_batch_normalisation_without_running_statistics_couples_in_evaluation_too():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).eval()
    assert PerExampleMeter(model, ParameterSet.of(model)).coupled() == "1"
