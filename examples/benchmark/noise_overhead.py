"""What watching costs: the same training loop bare and with GradientNoiseMonitor, alternated within one run.

    python examples/benchmark/noise_overhead.py            # three models on the CPU, a minute or two
    python examples/benchmark/noise_overhead.py --sizes      # cost from 1M to 100M parameters
    python examples/benchmark/noise_overhead.py --ranks      # two processes (gloo), the ranks as chunks
    python examples/benchmark/noise_overhead.py --lightning  # whole fits: bare, monitor, AdaptiveBatchSize

A *measured* update is timed against a bare one; the overhead at an interval of n updates is the difference over n.
Medians over updates, bare and measured ones taking turns, so that a slow stretch of the machine hits both. On the CPU
the process's own time counts (run it with OMP_NUM_THREADS=1), between ranks the clock's.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from autotune.noise.microbatch import ChunkMeter
from autotune.noise.parameters import ParameterSet
from autotune.noise.per_example import PerExampleMeter
from autotune.noise.ranks import Ranks
from autotune.noise.smoothing import NoiseSmoother

#: The monitor's default interval, in updates.
EVERY = 20


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Block(nn.Module):
    """A transformer block made of layers that fire their hooks."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, d)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def mlp(width=512, depth=3):
    layers = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10)), lambda n: torch.randn(n, 64)


def cnn(width=32):
    def stage(i, o):
        return [nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(4, o), nn.ReLU(), nn.MaxPool2d(2)]

    return (
        nn.Sequential(
            *stage(3, width),
            *stage(width, 2 * width),
            *stage(2 * width, 4 * width),
            nn.Flatten(),
            nn.Linear(64 * width, 10),
        ),
        lambda n: torch.randn(n, 3, 32, 32),
    )


def transformer(width=128, depth=2, length=64):
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(nn.Embedding(256, width), *blocks, Mean(), nn.Linear(width, 10)), lambda n: torch.randint(
        256, (n, length)
    )


def small_cnn():
    return cnn(8)


def small_transformer():
    return transformer(64, 2, 32)


def now(device):
    """Seconds: of this process on the CPU, where other work would count else; of the clock on a device."""
    return time.process_time() if device == "cpu" else time.perf_counter()


class Loop:
    """A bare accumulation loop, with or without a measurement in it."""

    def __init__(self, build, batch, accumulate, device):
        self.model, self.draw = build()
        self.model.to(device)
        self.device, self.batch, self.accumulate = device, batch, accumulate
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        parameters = ParameterSet.of(self.model)
        self.meters = {"microbatch": ChunkMeter(parameters), "per_example": PerExampleMeter(self.model, parameters)}
        self.smoother = NoiseSmoother()
        self.state = self.smoother.init()
        self.inputs = [self.draw(batch).to(device) for _ in range(accumulate)]
        self.labels = torch.randint(10, (batch,), device=device)

    def update(self, source):
        start = now(self.device)
        meter = self.meters.get(source)
        self.optimizer.zero_grad()
        if meter is not None:
            meter.begin()
        for inputs in self.inputs:
            if source == "per_example":
                meter.attach()
            loss = F.cross_entropy(self.model(inputs), self.labels) / self.accumulate
            if source == "microbatch":
                meter.listen()
            elif source == "per_example":
                meter.arm(self.batch, loss)
            loss.backward()
            if source == "microbatch":
                meter.end_chunk(self.batch, self.accumulate)
            elif source == "per_example":
                meter.end_chunk(self.batch * self.accumulate)
        if meter is not None:
            self.state = self.smoother.step(self.state, meter.close())
        self.optimizer.step()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return now(self.device) - start


def compare(build, batch, accumulate, source, device, rounds):
    loop = Loop(build, batch, accumulate, device)
    for kind in (None, source) * (3 if rounds > 5 else 1):
        loop.update(kind)
    bare, measured = [], []
    for index in range(rounds):
        order = ((None, bare), (source, measured)) if index % 2 else ((source, measured), (None, bare))
        for kind, times in order:
            times.append(loop.update(kind))
    numbers = sum(p.numel() for p in loop.model.parameters())
    base, extra = statistics.median(bare), statistics.median(measured)
    print(report(numbers, source, f"{accumulate} x {batch:3d}", base, extra), flush=True)


def rank(index, path, build, batch, rounds, lines):
    """One of two processes: a DDP update, bare and measured by ranks in turns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=index, world_size=2)
    torch.manual_seed(0)
    model, draw = build()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    meter, smoother = ChunkMeter(ParameterSet.of(model)), NoiseSmoother()
    state, inputs, labels = smoother.init(), draw(batch), torch.randint(10, (batch,))
    times = {False: [], True: []}
    for turn in range(2 * rounds + 6):
        measured = turn % 2 == 1
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(inputs), labels)
        if measured:
            meter.begin()
            meter.listen()
        loss.backward()
        if measured:
            meter.end_chunk(batch, 1.0)
            state = smoother.step(state, meter.close(Ranks.here()))
        optimizer.step()
        times[measured].append(time.perf_counter() - start)
    if index == 0:
        numbers = sum(p.numel() for p in model.parameters())
        base, extra = (statistics.median(times[kind][3:]) for kind in (False, True))
        lines.put(report(numbers, "ranks", f"2 x {batch:3d}", base, extra))
    dist.barrier()
    dist.destroy_process_group()


def report(numbers, source, batch, base, extra):
    share = (extra / base - 1) / EVERY
    return (
        f"{numbers / 1e6:7.1f}M  {source:12s} batch {batch}  bare {base * 1e3:8.2f} ms  "
        f"measured {extra * 1e3:8.2f} ms  every {EVERY}: {share:+.2%}"
    )


def by_ranks(build, batch, rounds):
    context = torch.multiprocessing.get_context("spawn")
    lines = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/rendezvous", build, batch, rounds, lines)
        workers = [context.Process(target=rank, args=(index, *arguments)) for index in range(2)]
        for worker in workers:
            worker.start()
        print(lines.get(), flush=True)
        for worker in workers:
            worker.join()


def fits(build, batch, accumulate, rounds, blocks=5):
    """Whole fits, in turns; seconds of a block of updates (one of them measured by the monitor), median of all."""
    import lightning as L

    from autotune.callbacks import AdaptiveBatchSize, GradientNoiseMonitor

    class Blocks(L.Callback):
        def __init__(self):
            self.at = []

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step % EVERY == 0 and not trainer.fit_loop._should_accumulate():
                self.at.append(now("cpu"))

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, _ = build()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    _, draw = build()
    size = batch * accumulate * EVERY * (blocks + 1)
    data = torch.utils.data.TensorDataset(draw(size), torch.randint(10, (size,)))
    kinds = {
        "bare": list, "monitor": lambda: [GradientNoiseMonitor()],
        "AdaptiveBatchSize": lambda: [AdaptiveBatchSize(max_batch_size=1)],
    }  # fmt: skip
    seconds = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, make in kinds.items():
            clock = Blocks()
            with tempfile.TemporaryDirectory() as folder:
                trainer = L.Trainer(
                    max_epochs=1, callbacks=[*make(), clock], accumulate_grad_batches=accumulate, accelerator="cpu",
                    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                    default_root_dir=folder,
                )  # fmt: skip
                trainer.fit(Module(), torch.utils.data.DataLoader(data, batch))
            seconds[kind] += [after - before for before, after in itertools.pairwise(clock.at)]
    base = statistics.median(seconds["bare"])
    for kind, times in seconds.items():
        found = statistics.median(times)
        cost = f"{1e3 * found / EVERY:7.3f} ms an update  {found / base - 1:+.2%}"
        print(f"    {accumulate} x {batch:3d}  {kind:18s} {cost}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", action="store_true", help="grow an MLP and a transformer from 1M to 100M parameters")
    parser.add_argument("--ranks", action="store_true", help="two processes on this machine")
    parser.add_argument("--lightning", action="store_true", help="monitor and controller inside Lightning")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    models = {"MLP": mlp, "CNN": cnn, "transformer": transformer}
    for name, build in models.items():
        print(name)
        if args.ranks:
            by_ranks(build, 64, args.rounds)
        if args.lightning:
            # Small ones: a whole fit is timed three times a round, and what we cost beside the gradients shows more.
            small = {"MLP": mlp, "CNN": small_cnn, "transformer": small_transformer}[name]
            fits(small, 32, 4, max(args.rounds // 10, 1))
            fits(small, 128, 1, max(args.rounds // 10, 1))
        if args.ranks or args.lightning or args.sizes:
            continue
        compare(build, 32, 4, "microbatch", args.device, args.rounds)
        compare(build, 128, 1, "per_example", args.device, args.rounds)
    if args.sizes:
        for width in (512, 1600, 5000):
            print(f"MLP of width {width}")
            for accumulate, source in ((4, "microbatch"), (1, "per_example")):
                build = lambda w=width: mlp(w, 5)  # noqa: E731
                compare(build, 64 // accumulate, accumulate, source, args.device, max(args.rounds // 6, 3))
        for width, depth in ((128, 5), (384, 6), (768, 14))[: None if args.device != "cpu" else 2]:
            print(f"transformer of width {width}, {depth} blocks")
            for accumulate, source in ((2, "microbatch"), (1, "per_example")):
                build = lambda w=width, d=depth: transformer(w, d)  # noqa: E731
                compare(build, 8 // accumulate, accumulate, source, args.device, max(args.rounds // 10, 3))


if __name__ == "__main__":
    main()
