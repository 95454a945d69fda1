"""Two processes, and memory that really runs out."""

import subprocess
import sys
import textwrap

import lightning as L
import pytest
import torch

from tests.batch.toys import QUIET, Weighing, assert_every_update_is_a_mean, loader

SETUP = """
import sys, torch, warnings, lightning as L
warnings.simplefilter("ignore")
from autotune.callbacks import AdaptiveBatchSize, GradientNoiseMonitor
from tests.batch.toys import QUIET, Weighing, loader
"""


def python(code, *arguments, timeout=600):
    program = SETUP + textwrap.dedent(code)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


RANK = """
from tests.callbacks.test_growth_ranks import fit_rank
fit_rank(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "shuffle", sys.argv[5] == "drop", int(sys.argv[6]))
"""


def fit_rank(out, rank, rendezvous, shuffle, drop_last, workers):
    import os

    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from autotune.callbacks import AdaptiveBatchSize

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=rendezvous, LOCAL_RANK=str(rank), NODE_RANK="0")
    callback = AdaptiveBatchSize(max_batch_size=32, rule="norm", every_n_steps=3)
    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
    options = {**QUIET, "max_epochs": 2, "default_root_dir": out, "num_sanity_val_steps": 0}
    trainer = L.Trainer(callbacks=[callback], devices=2, strategy=strategy, **options)
    model = Weighing()
    trainer.fit(model, loader(shuffle=shuffle, drop_last=drop_last, num_workers=workers))
    decisions = [decision.to_dict() for decision in callback.decisions]
    result = {"updates": model.updates, "batches": model.batches, "decisions": decisions, "k": callback.batch_size}
    torch.save({**result, "epochs": model.epoch_of_update}, f"{out}/{rank}.pt")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("shuffle", "drop_last", "workers"),
    [
        ("shuffle", "keep", 0),
        pytest.param("plain", "drop", 0, marks=pytest.mark.slow),
        pytest.param("shuffle", "drop", 2, marks=pytest.mark.slow),
        pytest.param("plain", "keep", 2, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_agree_and_see_every_example_once(tmp_path, shuffle, drop_last, workers):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SETUP + RANK, str(tmp_path), str(rank), str(port), shuffle, drop_last, str(workers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["decisions"] == ranks[1]["decisions"]
    assert ranks[0]["k"] == ranks[1]["k"] == 32
    assert_every_update_is_a_mean(ranks[0]["updates"])
    for a, b in zip(ranks[0]["updates"], ranks[1]["updates"], strict=True):
        assert torch.equal(a, b)
    missing = 31 if drop_last == "drop" else 0
    for epoch in (0, 1):
        seen = sum((w > 0).int() for w, e in zip(ranks[0]["updates"], ranks[0]["epochs"], strict=True) if e == epoch)
        assert seen.max() == 1
        assert int(seen.sum()) >= 100 - missing


OUT_OF_MEMORY = """
import resource
from torch import nn

class Hungry(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.examples = 0

    def training_step(self, batch, batch_idx):
        # A megabyte an example, kept for the backward pass.
        wide = self.layer(batch[0]).repeat(1, 4096)
        return (wide.sin() * wide.cos()).mean()

    def on_after_backward(self):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

torch.set_num_threads(1)
# Of what is drawn here one run in six has a loss that rises with the larger batch, and takes the growth back.
L.seed_everything(0, verbose=False)
data = torch.utils.data.TensorDataset(torch.randn(512, 64))
callback = AdaptiveBatchSize(max_batch_size=256, rule="norm", eta=1e-3, every_n_steps=2)

class Cap(L.Callback):
    def on_train_start(self, trainer, pl_module):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20,) * 2)

trainer = L.Trainer(callbacks=[callback, Cap()], max_epochs=2, default_root_dir=sys.argv[1], **QUIET)
trainer.fit(Hungry(), torch.utils.data.DataLoader(data, 8, shuffle=True))
actions = [d.action for d in callback.decisions]
print(actions, callback._windows.piece_limit, callback.batch_size, trainer.global_step)
assert "split" in actions and callback.batch_size == 256
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is capped by RLIMIT_AS")
def test_memory_that_really_runs_out_is_survived(tmp_path):
    result = python(OUT_OF_MEMORY, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
