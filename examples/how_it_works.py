"""One real run under both controllers, and the README's picture of it.

    python examples/how_it_works.py                     # trains for about half a minute, then draws
    python examples/how_it_works.py --run RUN_DIRECTORY # draws a run that is there already

Needs mnist1d and matplotlib (``pip install "lightning-autotune[benchmark]"``). The figure goes to
``examples/images/how_it_works.svg``.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import warnings

import lightning as L
import matplotlib as mpl
import torch
import torch.nn.functional as F
from grow_batch import mnist1d
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from autotune.callbacks import AdaptiveBatchSize, AutoLRS
from autotune.report.reading import read_run
from autotune.report.tracks import batch_size, forecasts, learning_rate, noise_scale

mpl.use("Agg")
import matplotlib.pyplot as plt

PLACE = pathlib.Path(__file__).parent / "images" / "how_it_works.svg"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0b5cad", "#b45309", "#047857", "#7e3ab0", "#6b7280"


class Classifier(L.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)


def train(folder, epochs):
    workload = mnist1d()
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=epochs, logger=CSVLogger(folder, name="", version=""), log_every_n_steps=5,
        callbacks=[AutoLRS(), AdaptiveBatchSize(max_batch_size=256)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    train_set = DataLoader(workload["train"], workload["start"], shuffle=True)
    trainer.fit(Classifier(workload["network"]()), train_set, DataLoader(workload["val"], 1000))


def draw(run, place):
    search = next(decision for decision in run.decisions if decision.kind == "search" and decision.action == "set_lr")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "a"})
    figure, axes = plt.subplot_mosaic([["trials", "rate"], ["posterior", "batch"], ["posterior", "loss"]],
                                      figsize=(10, 6.4), layout="constrained")  # fmt: skip
    _trials(axes["trials"], search)
    _posterior(axes["posterior"], search)
    rate, size, noise = learning_rate(run), batch_size(run), noise_scale(run)
    axes["rate"].plot(rate.steps, rate.values, color=GREEN)
    axes["rate"].set(title="3  Climb with the loss, decay to zero at the known end", ylabel="learning rate")
    axes["batch"].step(size.steps, size.values, where="post", color=ORANGE, label="batch")
    axes["batch"].plot(noise.steps, noise.values, ":", color=GREY, label="noise scale")
    axes["batch"].set(title="4  Grow the batch with the gradient noise", ylabel="examples")
    axes["batch"].set_yscale("log", base=2)
    axes["batch"].yaxis.set_major_formatter("{x:g}")
    axes["batch"].legend(frameon=False)
    _loss(axes["loss"], run)
    place.parent.mkdir(exist_ok=True)
    figure.savefig(place, metadata={"Date": None})
    print(f"drawn: {place}")


def _trials(axis, search):
    chosen = search.numbers["lr"]
    for trial in search.numbers["candidates"]:
        steps, losses = zip(*trial["curve"], strict=True)
        far = abs(torch.tensor(trial["lr"] / chosen).log10().item())
        axis.plot(steps, losses, color=BLUE, alpha=max(1 - far, 0.15), linewidth=1)
        if trial["status"] != "finished":
            axis.plot(steps[-1], losses[-1], "v", color=ORANGE)
    axis.set(title="1  Try rates, each decayed to zero, from the same weights", xlabel="trial step", ylabel="loss")


def _posterior(axis, search):
    trials = [trial for trial in search.numbers["candidates"] if trial["status"] == "finished"]
    longest = max(trial["horizon_steps"] for trial in trials)
    top = search.numbers["initial_loss"]
    for trial in trials:
        best = min(other["loss"] for other in trials if other["horizon_steps"] == trial["horizon_steps"])
        long = trial["horizon_steps"] == longest
        axis.plot(trial["lr"], (trial["loss"] - best) / (top - best), "o", color=BLUE, markersize=8 if long else 4)
    found = search.numbers["posterior"]
    low, high = ([m + k * s for m, s in zip(found["mean"], found["sd"], strict=True)] for k in (-2, 2))
    axis.plot(found["lr"], found["mean"], color=PURPLE)
    axis.fill_between(found["lr"], low, high, color=PURPLE, alpha=0.15, linewidth=0)
    axis.axvline(search.numbers["lr"], color=GREEN, linestyle="--", label="the run begins here and climbs")
    axis.legend(frameon=False, loc="upper right")
    axis.set(
        title="2  A Gaussian process says which", xscale="log", xlabel="learning rate", ylabel="progress left undone"
    )


def _loss(axis, run):
    curve = run.metrics["val_loss"]
    axis.plot(curve.steps, curve.values, color=BLUE, label="validation loss")
    for index, forecast in enumerate(one for one in forecasts(run) if one.outcome is not None):
        axis.plot([forecast.came_at] * 2, [forecast.low, forecast.high], color=PURPLE, linewidth=3, alpha=0.6,
                  label=None if index else "forecast")  # fmt: skip
        axis.plot(forecast.came_at, forecast.outcome, "x", color=BLUE)
    axis.set(title="5  Watch: forecasts, and what came", xlabel="update", ylabel="loss")
    axis.legend(frameon=False)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=pathlib.Path, help="a directory with decisions.jsonl and metrics.csv")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("-o", "--output", type=pathlib.Path, default=PLACE)
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if args.run is None:
            train(folder, args.epochs)
        draw(read_run(args.run or folder), args.output)


if __name__ == "__main__":
    main()
