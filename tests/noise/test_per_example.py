import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autotune.errors import UnsupportedSetupError
from autotune.noise.microbatch import Extras
from autotune.noise.parameters import ParameterSet
from autotune.noise.per_example import PerExampleMeter
from tests.noise.twins import (
    Attention,
    ByHand,
    Mean,
    Pool,
    Tied,
    Transpose,
    Twice,
    per_example_gradients,
    variance,
)

N = 9


def ids(shape, vocabulary=7):
    return torch.randint(vocabulary, shape)


CASES = {
    "linear": lambda: (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(N, 6)),
    "linear without bias": lambda: (nn.Linear(6, 3, bias=False), torch.randn(N, 6)),
    "short sequence (ghost)": lambda: (
        nn.Sequential(nn.Linear(20, 20), nn.Tanh(), Pool(), nn.Linear(20, 3)),
        torch.randn(N, 4, 20),
    ),
    "long sequence (instantiated)": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Pool(), nn.Linear(4, 3)),
        torch.randn(N, 40, 3),
    ),
    "two axes of positions": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(1, 2), Pool(), nn.Linear(4, 3)),
        torch.randn(N, 5, 2, 3),
    ),
    "conv1d": lambda: (
        nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2),
            nn.ReLU(inplace=True),
            Mean(),
            nn.Linear(4, 3),
        ),
        torch.randn(N, 2, 17),
    ),
    "conv2d, groups": lambda: (
        nn.Sequential(
            nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2),
            nn.ReLU(),
            Mean(),
            nn.Linear(6, 3),
        ),
        torch.randn(N, 4, 7, 6),
    ),
    "conv2d, same": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)), nn.ReLU(), Mean()),
        torch.randn(N, 2, 7, 9),
    ),
    "conv3d, depthwise": lambda: (
        nn.Sequential(nn.Conv3d(3, 3, 2, groups=3), nn.ReLU(), Mean(), nn.Linear(3, 3)),
        torch.randn(N, 3, 3, 4, 5),
    ),
    "layer norm": lambda: (
        nn.Sequential(nn.LayerNorm((5, 6)), nn.Flatten(), nn.Linear(30, 3)),
        torch.randn(N, 5, 6),
    ),
    "layer norm over positions": lambda: (
        nn.Sequential(nn.LayerNorm(6, bias=False), nn.Tanh(), Pool(), nn.Linear(6, 3)),
        torch.randn(N, 5, 6),
    ),
    "rms norm": lambda: (
        nn.Sequential(nn.RMSNorm(6), nn.Tanh(), Pool(), nn.Linear(6, 3)),
        torch.randn(N, 5, 6),
    ),
    "group norm": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), Mean(), nn.Linear(4, 3)),
        torch.randn(N, 2, 6, 6),
    ),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(7, 5, padding_idx=0), nn.Tanh(), Pool(), nn.Linear(5, 3)),
        ids((N, 12)),
    ),
    "embedding of one token": lambda: (nn.Sequential(nn.Embedding(7, 3)), ids((N,))),
    "tied table": lambda: (Tied(), ids((N, 6))),
    "layer used twice": lambda: (Twice(), torch.randn(N, 6)),
    "attention": lambda: (Attention(), torch.randn(N, 5, 4)),
    "attention, positions first, masked": lambda: (Attention(batch_first=False, masked=True), torch.randn(N, 5, 4)),
    "attention across, own biases": lambda: (
        Attention(cross=True, add_bias_kv=True, add_zero_attn=True),
        torch.randn(N, 5, 4),
    ),
    "attention across, three matrices": lambda: (
        Attention(cross=True, kdim=6, vdim=6, bias=False),
        torch.randn(N, 5, 4),
    ),
    "encoder layer": lambda: (
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
            Pool(),
            nn.Linear(4, 3),
        ),
        torch.randn(N, 5, 4),
    ),
}


def measure(model, x, y, reduction="mean", extras=None, by_module=False, metric=None):
    parameters = ParameterSet.of(model, by_module=by_module)
    meter = PerExampleMeter(model, parameters, extras)
    meter.begin()
    meter.attach()
    loss = F.cross_entropy(model(x), y, reduction=reduction)
    meter.arm(len(x), loss, metric)
    loss.backward()
    meter.end_chunk(len(x) if reduction == "mean" else 1.0)
    record = meter.close(scale=1.0 if reduction == "mean" else 1.0 / len(x))
    return record, meter


def twin(model, x, y, keep=lambda name: True):
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and keep(name)]
    return per_example_gradients(model, lambda o, t: F.cross_entropy(o, t), x, y, parameters)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_over_examples(case, reduction):
    torch.manual_seed(0)
    model, x = CASES[case]()
    y = torch.randint(3, (N,))
    rows = twin(model, x, y)
    record, meter = measure(model, x, y, reduction)
    assert meter.coverage().share == 1.0
    assert meter.coverage().excluded == {}
    assert float(record.sums.chunk_sq) == pytest.approx(float(rows.square().sum()), rel=1e-5)
    assert float(record.mean_sq) == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-5)
    assert float(record.variance()) == pytest.approx(variance(rows), rel=1e-5)


@pytest.mark.parametrize(
    "case", ["linear", "conv2d, groups", "tied table", "layer norm", "embedding", "attention across, three matrices"]
)
def test_inner_products_coordinates_and_metric(case):
    torch.manual_seed(1)
    model, x = CASES[case]()
    y = torch.randint(3, (N,))
    rows = twin(model, x, y)
    record, _ = measure(model, x, y, extras=Extras(inner=True, coordinate=True, quantile=0.5))
    mean = rows.mean(0)
    assert float(record.inner_product_variance()) == pytest.approx(float((rows @ mean).var()), rel=1e-4)
    ratios = rows.var(0) / mean.square()
    ratios = torch.where(rows.var(0) > 1e-14, ratios, torch.zeros_like(ratios)).sort().values
    assert float(record.coordinate) == pytest.approx(float(ratios[-(-len(ratios) // 2) - 1]), rel=1e-3)
    metric = {p: torch.rand_like(p) + 0.5 for p in model.parameters()}
    flat = torch.cat([metric[p].reshape(-1) for p in model.parameters()]).double()
    for parameter in model.parameters():
        parameter.grad = None
    record, _ = measure(model, x, y, metric=metric)
    assert float(record.variance()) == pytest.approx(variance(rows * flat), rel=1e-5)


def test_frozen_parameters_are_no_part_of_it():
    torch.manual_seed(2)
    model, x = CASES["group norm"]()
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    y = torch.randint(3, (N,))
    record, meter = measure(model, x, y)
    assert meter.coverage().share == 1.0
    assert float(record.variance()) == pytest.approx(variance(twin(model, x, y)), rel=1e-5)


def test_groups_by_module_add_up_to_the_whole():
    torch.manual_seed(3)
    model, x = CASES["group norm"]()
    y = torch.randint(3, (N,))
    record, meter = measure(model, x, y, by_module=True)
    assert meter.wanted.group_names == ("0", "1", "4")
    for index, name in enumerate(meter.wanted.group_names):
        rows = twin(model, x, y, lambda parameter, name=name: parameter.startswith(name + "."))
        assert float(record.variance()[index]) == pytest.approx(variance(rows), rel=1e-5)
    assert float(record.total().variance()) == pytest.approx(variance(twin(model, x, y)), rel=1e-5)


def test_half_precision_is_close():
    torch.manual_seed(4)
    model, x = CASES["linear"]()
    y = torch.randint(3, (N,))
    rows = twin(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record, _ = measure(model, x, y)
    assert float(record.variance()) == pytest.approx(variance(rows), rel=0.05)


def test_what_no_layer_accounts_for_is_left_out_by_name():
    torch.manual_seed(5)
    model, x, y = ByHand(), torch.randn(N, 6), torch.randint(3, (N,))
    record, meter = measure(model, x, y)
    coverage = meter.coverage()
    assert set(coverage.excluded) == {"scale", "layer.weight"}
    assert "without its layer" in coverage.excluded["layer.weight"]
    assert coverage.share == pytest.approx(1 - 42 / (6 + 42 + 21))
    rows = twin(model, x, y, lambda name: name in ("layer.bias", "head.weight", "head.bias"))
    assert float(record.variance()) == pytest.approx(variance(rows), rel=1e-5)


def test_attention_with_dropout_is_left_out_by_name():
    torch.manual_seed(6)
    model, x, y = Attention(dropout=0.5), torch.randn(N, 5, 4), torch.randint(3, (N,))
    record, meter = measure(model, x, y)
    assert {name.rpartition(".")[0] for name in meter.coverage().excluded} == {
        "attention",
        "attention.out_proj",
    }
    attention = sum(p.numel() for p in model.attention.parameters())
    assert meter.coverage().share == pytest.approx(1 - attention / sum(p.numel() for p in model.parameters()))
    # The others' gradients hang on the masks: the batch's own, which a loop over examples draws anew.
    assert float(record.variance()) > 0


def test_attention_whose_weights_are_used_is_left_out_by_name():
    class Looking(Attention):
        def forward(self, x):
            h = self.embed(x)
            out, weights = self.attention(h, h, h)
            return self.head(out.mean(1)) + weights.square().mean((1, 2)).unsqueeze(1) * torch.arange(3)

    torch.manual_seed(6)
    model, x, y = Looking(), torch.randn(N, 5, 4), torch.randint(3, (N,))
    record, meter = measure(model, x, y)
    assert set(meter.coverage().excluded.values()) == {"the loss uses its attention weights"}
    rows = twin(model, x, y, lambda name: not name.startswith("attention"))
    assert float(record.variance()) == pytest.approx(variance(rows), rel=1e-5)


def test_positions_folded_into_the_batch_are_left_out():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.inner(x.reshape(-1, 4)).reshape(len(x), -1, 4).mean(1))

    torch.manual_seed(7)
    _, meter = measure(Folded(), torch.randn(N, 5, 4), torch.randint(3, (N,)))
    assert set(meter.coverage().excluded) == {"inner.weight", "inner.bias"}
    assert "first axis is 45 long, the batch 9" in meter.coverage().excluded["inner.weight"]


def test_batch_normalisation_is_refused_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    meter = PerExampleMeter(model, ParameterSet.of(model))
    with pytest.raises(UnsupportedSetupError, match="neighbours"):
        meter.attach()
    model.eval()
    meter.attach()
    meter.detach()


def test_a_model_without_any_supported_layer_is_refused():
    model = nn.LSTM(3, 4)
    with pytest.raises(UnsupportedSetupError, match="LSTM"):
        PerExampleMeter(model, ParameterSet.of(model))


def test_passes_that_nobody_armed_leave_nothing():
    torch.manual_seed(8)
    model, x = CASES["linear"]()
    y = torch.randint(3, (N,))
    rows = twin(model, x, y)
    meter = PerExampleMeter(model, ParameterSet.of(model))
    meter.attach()
    F.cross_entropy(model(torch.randn(4, 6)), torch.randint(3, (4,))).backward()  # a trial step
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    meter.arm(N, loss)
    loss.backward()
    meter.end_chunk(N)
    assert float(meter.close().variance()) == pytest.approx(variance(rows), rel=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_transposed_inputs_do_not_fool_the_layers():
    torch.manual_seed(9)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Transpose(), nn.Linear(4, 5), nn.Tanh(), Pool(), nn.Linear(5, 3))
    x, y = torch.randn(N, 2, 6, 6), torch.randint(3, (N,))
    record, _ = measure(model, x, y)
    assert float(record.variance()) == pytest.approx(variance(twin(model, x, y)), rel=1e-5)


def test_a_window_of_several_micro_batches_is_one_record():
    torch.manual_seed(10)
    model, x = CASES["conv2d, groups"]()
    y = torch.randint(3, (N,))
    meter = PerExampleMeter(model, ParameterSet.of(model))
    meter.begin()
    for part in (slice(0, 5), slice(5, 9)):
        size = len(x[part])
        meter.attach()
        loss = F.cross_entropy(model(x[part]), y[part]) * size / N
        meter.arm(size, loss)
        loss.backward()
        meter.end_chunk(float(N))
    record = meter.close()
    assert float(record.variance()) == pytest.approx(variance(twin(model, x, y)), rel=1e-5)
