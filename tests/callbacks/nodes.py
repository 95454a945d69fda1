"""What ``torchrun`` starts on each process of two nodes."""

import os

import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from tests.callbacks.journey import Journey


def main(folder):
    """A run on two nodes of two processes; each writes what it decided."""
    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    run = Journey(folder, "both", ranks=2, num_nodes=2, strategy=strategy)
    torch.save(
        {"decisions": run.decisions, "rows": run.track.rows, "weights": run.weights},
        f"{folder}/{os.environ['RANK']}.pt",
    )
