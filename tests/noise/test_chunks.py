import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from autotune.noise.consecutive import ConsecutiveMeter
from autotune.noise.microbatch import ChunkMeter, Extras
from autotune.noise.parameters import ParameterSet, adam_metric
from autotune.noise.ranks import Ranks
from autotune.noise.statistics import ChunkSums, kish_effective
from tests.noise.twins import chunked_variance, per_example_gradients

SIZES = [6, 6, 6, 3]


def setup(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=False), nn.Tanh(), nn.Linear(8, 3))
    model[1].eval()  # a fixed function, so that the per-example twin exists
    return model, torch.randn(sum(SIZES), 5), torch.randint(3, (sum(SIZES),))


def rows_of(model, x, y):
    return per_example_gradients(model, F.cross_entropy, x, y, list(model.parameters()))


def window(model, x, y, weights, reduction="mean", extras=None, loss_scale=1.0, metric=None, sizes=SIZES):
    """One accumulation window as a loop runs it: every loss divided by what its weight says."""
    meter = ChunkMeter(ParameterSet.of(model), extras)
    model.zero_grad()
    meter.begin(metric)
    start = 0
    for size, weight in zip(sizes, weights, strict=True):
        loss = F.cross_entropy(model(x[start : start + size]), y[start : start + size], reduction=reduction)
        meter.listen()
        (loss * weight * loss_scale).backward()
        divisor = weight * loss_scale * (size if reduction == "sum" else 1)
        meter.end_chunk(size, 1.0 / divisor)
        start += size
    return meter


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_micro_batches_equal_the_definition(reduction, loss_scale):
    model, x, y = setup()
    total = sum(SIZES)
    weights = [s / total for s in SIZES] if reduction == "mean" else [1.0 / 4] * 4
    meter = window(model, x, y, weights, reduction, loss_scale=loss_scale)
    record = meter.close(scale=(1 if reduction == "mean" else 4 / total) / loss_scale)
    rows = rows_of(model, x, y)
    assert float(record.variance()) == pytest.approx(chunked_variance(rows, SIZES), rel=1e-5)
    assert float(record.mean_sq) == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-5)


@pytest.mark.statistical
def test_a_window_weighted_by_chunks_is_still_unbiased():
    """Lightning weights micro-batches alike, however many examples they hold."""
    torch.manual_seed(0)
    weights, p, spread = [0.25] * 4, 20, 2.0
    found = []
    for _ in range(4000):
        chunks = torch.stack([1 + spread * torch.randn(p, dtype=torch.double) / s**0.5 for s in SIZES])
        mean = torch.einsum("m,mp->p", torch.tensor(weights, dtype=torch.double), chunks)
        record = ChunkSums.of(SIZES, chunks.square().sum(1)).close(mean.square().sum(), kish_effective(weights, SIZES))
        found.append([float(record.variance()), float(record.signal())])
    values = torch.tensor(found)
    truth = torch.tensor([spread**2 * p, 1.0 * p])
    assert ((values.mean(0) - truth).abs() < 4 * values.std(0) / len(values) ** 0.5).all()


def test_inner_products_and_coordinates_equal_the_definition():
    model, x, y = setup(1)
    sizes = [7, 7, 7]
    meter = window(model, x, y, [1 / 3] * 3, extras=Extras(inner=True, coordinate=True), sizes=sizes)
    record = meter.close()
    rows = rows_of(model, x, y)
    means = torch.stack([rows[:7].mean(0), rows[7:14].mean(0), rows[14:].mean(0)])
    mean = rows.mean(0)
    assert float(record.inner_product_variance()) == pytest.approx(7 * float((means @ mean).var()), rel=1e-4)
    total = chunked_variance(rows, sizes)
    along = 7 * float((means @ mean).var()) / float(mean.square().sum())
    assert float(record.orthogonal_variance()) == pytest.approx(total - along, rel=1e-4)
    assert float(record.coordinate) == pytest.approx(float((7 * means.var(0) / mean.square()).max()), rel=1e-2)


def test_adam_metric_is_the_optimizers_own():
    model, x, y = setup(2)
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-3)
    assert adam_metric(optimizer) == {}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    metric = adam_metric(optimizer)
    state = {p: optimizer.state[p] for p in model.parameters()}
    sizes = [7, 7, 7]
    record = window(model, x, y, [1 / 3] * 3, metric=metric, sizes=sizes).close()
    flat = torch.cat([metric[p].reshape(-1) for p in model.parameters()]).double()
    expected = [(state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt().add(1e-3).reciprocal() for p in model.parameters()]
    assert torch.allclose(flat, torch.cat([e.reshape(-1) for e in expected]).double(), rtol=1e-5)
    assert float(record.variance()) == pytest.approx(chunked_variance(rows_of(model, x, y) * flat, sizes), rel=1e-5)


def test_two_consecutive_updates_at_frozen_weights_are_two_chunks():
    model, x, y = setup(3)
    meter = ConsecutiveMeter(ParameterSet.of(model))
    F.cross_entropy(model(x[:12]), y[:12]).backward()
    meter.keep(12)
    model.zero_grad()
    F.cross_entropy(model(x[12:]), y[12:]).backward()
    record = meter.close(9)
    rows = rows_of(model, x, y)
    assert float(record.variance()) == pytest.approx(chunked_variance(rows, [12, 9]), rel=1e-4)
    assert float(record.mean_sq) == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-5)


def test_two_backward_passes_in_one_chunk_spoil_the_record():
    model, x, y = setup(4)
    meter = ChunkMeter(ParameterSet.of(model))
    meter.begin()
    for chunk in range(2):
        meter.listen()
        for _ in range(2 - chunk):
            F.cross_entropy(model(x), y).backward()
        meter.end_chunk(len(x))
    assert torch.isnan(meter.close().variance())


def _rank(rank, path, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model, x, y = setup(5)
    wrapped = nn.parallel.DistributedDataParallel(model)
    half = slice(0, 12) if rank == 0 else slice(12, 24)
    x, y = torch.cat([x, x[:3]])[half], torch.cat([y, y[:3]])[half]
    meter = ChunkMeter(ParameterSet.of(model), Extras(inner=True, coordinate=True))
    meter.begin()
    for step in range(2):
        part = slice(6 * step, 6 * step + 6)
        if step == 0:
            with wrapped.no_sync():
                loss = F.cross_entropy(wrapped(x[part]), y[part]) / 2
                meter.listen()
                loss.backward()
        else:
            loss = F.cross_entropy(wrapped(x[part]), y[part]) / 2
            meter.listen()
            loss.backward()
        meter.end_chunk(6, 2.0)
    record = meter.close(Ranks.here())
    queue.put((rank, record.pack().tolist()))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_give_the_record_of_one_on_the_joined_batch(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_rank, args=(r, tmp_path / "rendezvous", queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
    model, x, y = setup(5)
    x, y = torch.cat([x, x[:3]]), torch.cat([y, y[:3]])
    sizes = [6, 6, 6, 6]
    alone = window(model, x, y, [0.25] * 4, extras=Extras(inner=True, coordinate=True), sizes=sizes).close()
    assert found[0] == found[1]
    assert found[0] == pytest.approx(alone.pack().tolist(), rel=1e-4)
