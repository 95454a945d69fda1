"""Several real processes: decisions are the same on every rank, whatever one of them meets."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset

from autotune.callbacks import AdaptiveBatchSize, GradientNoiseMonitor, ReplaySchedule
from autotune.errors import UnsupportedSetupError
from tests.callbacks.journey import Journey, Net, controllers, data, on_ranks, run_apart

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow, pytest.mark.distributed]


class OneRank(Net):
    """On rank 1 alone: a loss that is NaN in training, or one that explodes in trials at high rates."""

    def __init__(self, trouble):
        super().__init__()
        self.trouble = trouble

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_rank != 1:
            return loss
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        if self.trouble == "explodes" and self.in_trial() and rate > 0.03:
            return loss * 1e30
        rolled = any(one.kind == "rollback" for one in self.lrs.decisions)
        if self.trouble == "nan" and not self.in_trial() and self.trainer.global_step >= 40 and not rolled:
            return loss * torch.nan
        return loss


class Sharded(Net):
    """Its layers are sharded by FSDP2, the inner ones apart from the whole."""

    def configure_model(self):
        if not any(hasattr(p, "to_local") for p in self.parameters()):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def uneven(rank):
    """38 batches on every rank (a rank with fewer would leave the others waiting): the last of 4 examples, or of 1."""
    part = Subset(data(), range(297, 594) if rank else range(300))
    return DataLoader(part, 8, shuffle=True)


def rank(number, folder, world, case):
    chosen = controllers("both" if case == "plain" else "lrs")
    module = OneRank(case)
    module.__dict__["lrs"] = chosen[0]
    more = {"train": uneven(number), "use_distributed_sampler": False} if case == "uneven" else {}
    note(Journey(folder, chosen, module=module, ranks=world, **more), f"{folder}/{number}.pt")


def note(run, path):
    torch.save({"decisions": run.decisions, "rows": run.track.rows, "weights": run.weights}, path)


def sharded_rank(number, folder):
    """A run on two ranks, the same from its second epoch's checkpoint, and its log played without a search."""

    def fit(place, callbacks, ckpt=None, more=()):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        strategy.cluster_environment = LightningEnvironment()
        module = Sharded()
        return Journey(f"{folder}/{place}", callbacks, ckpt, more, module=module, ranks=2, strategy=strategy)

    saved = ModelCheckpoint(f"{folder}/saved", "{epoch}", save_top_k=-1)
    note(fit("whole", controllers("lrs"), more=[saved]), f"{folder}/{number}.pt")
    note(fit("resumed", controllers("lrs"), f"{folder}/saved/epoch=1.ckpt"), f"{folder}/resumed{number}.pt")
    for measuring in (AdaptiveBatchSize(), GradientNoiseMonitor()):
        with pytest.raises(UnsupportedSetupError, match=r"parameters are sharded.*use strategy='ddp'"):
            fit("refused", [measuring])
    note(fit("replayed", [ReplaySchedule(f"{folder}/whole")]), f"{folder}/replayed{number}.pt")


def fork_sharded(folder):
    on_ranks(2, sharded_rank, folder)


def fork(folder, world, case):
    on_ranks(int(world), rank, folder, int(world), case)


def assert_alike(folder, world):
    found = [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(world)]
    for other in found[1:]:
        assert other["decisions"] == found[0]["decisions"]
        assert other["weights"] == found[0]["weights"]
        assert [row[2] for row in other["rows"]] == [row[2] for row in found[0]["rows"]]
    return [one for decisions in found[0]["decisions"] for one in decisions]


def searches(decisions):
    return [one for one in decisions if one["kind"] == "search" and one["action"] != "skip"]


@pytest.mark.parametrize(("case", "world"), [("plain", 4), ("uneven", 2), ("nan", 2), ("explodes", 2)])
def test_decisions_are_alike(tmp_path, case, world):
    run_apart("tests.callbacks.test_ranks:fork", tmp_path, world, case)
    decisions = assert_alike(tmp_path, world)
    assert searches(decisions)
    if case == "nan":
        assert [one for one in decisions if one["action"] == "roll_back"]
    if case == "explodes":
        found = searches(decisions)[0]["numbers"]
        assert {one["status"] for one in found["candidates"] if one["lr"] > 0.1} <= {"diverged", "stopped"}
        assert found["lr"] < 0.1


def test_shards(tmp_path):
    """FSDP2 as Lightning ships it: alike on both ranks, resumed exactly, and trials leave no trace."""
    run_apart("tests.callbacks.test_ranks:fork_sharded", tmp_path)
    decisions = assert_alike(tmp_path, 2)
    assert len(searches(decisions)) >= 2
    whole, resumed, replayed = (torch.load(tmp_path / f"{name}0.pt", weights_only=True)
                                for name in ("", "resumed", "replayed"))  # fmt: skip
    assert replayed["rows"] == whole["rows"]
    assert resumed["rows"] == whole["rows"][-len(resumed["rows"]) :]
    assert 0 < len(resumed["rows"]) < len(whole["rows"])
    assert resumed["decisions"] == whole["decisions"]
    assert resumed["weights"] == whole["weights"] == replayed["weights"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="loopback")
def test_two_nodes_under_torchrun(tmp_path):
    """``torchrun`` with two nodes of two processes each, all on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, warnings, torch\nwarnings.simplefilter('ignore')\ntorch.set_num_threads(1)\n"
        f"sys.path.insert(0, {str(Path.cwd())!r})\n"
        f"from tests.callbacks.nodes import main\nmain({str(tmp_path)!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=autotune"]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [*command, f"--node_rank={node}", str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for node in range(2)
    ]
    try:
        said = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    assert all(node.returncode == 0 for node in nodes), said[0][-3000:] + said[1][-3000:]
    assert assert_alike(tmp_path, 4)
