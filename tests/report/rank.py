"""One of two ranks: a run under both controllers, and its replay; tells what this process wrote and logged.

python rank.py FOLDER RANK PORT
"""

import json
import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from test_replay_batch import Net, growing
from torch.utils.data import DataLoader, TensorDataset

from autotune.callbacks import AutoLRS, DecisionLogger, ReplaySchedule


class Recorder(Logger):
    """A logger that, unlike Lightning's own, does not look at the rank itself."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.ours = []

    def log_metrics(self, metrics, step=None):
        self.ours += [name for name in metrics if name.startswith("autotune/")]

    def log_hyperparams(self, params, *args, **kwargs):
        self.ours += [name for name in params if name.startswith("autotune/")]


def opened_below(folder):
    """The files that this process opens for writing below ``folder`` from now on, as a list that grows."""
    opened = []

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            mode = arguments[1] or ""
            if any(letter in str(mode) for letter in "wax+") and str(arguments[0]).startswith(str(folder / "run")):
                opened.append(os.path.relpath(arguments[0], folder))

    sys.addaudithook(note)
    return opened


def fit(folder, name, callbacks):
    recorder, listener = Recorder(), DecisionLogger()
    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", devices=2, strategy=strategy, callbacks=[*callbacks, listener],
        logger=[CSVLogger(folder / "run", name=name, version=0), recorder], log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    L.seed_everything(1, verbose=False)
    model = Net(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(905, 8, generator=generator)
    y = (x[:, :3] + 1.5 * torch.randn(905, 3, generator=generator)).argmax(1)
    data = TensorDataset(x, y, torch.arange(905))
    trainer.fit(model, DataLoader(data, 4, shuffle=True), DataLoader(TensorDataset(x[:200], y[:200]), 100))
    weights = {key: value.tolist() for key, value in model.state_dict().items()}
    path = None if listener.path is None else str(listener.path)
    decisions = [[d.kind, d.action, d.step] for callback in callbacks for d in callback.decisions]
    return {
        "path": path,
        "decisions": decisions,
        "ours": sorted(set(recorder.ours)),
        "weights": weights,
        "log_dir": trainer.log_dir,
    }


if __name__ == "__main__":
    folder, rank, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    opened = opened_below(folder)
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(1)
    first = fit(folder, "a", [AutoLRS(search_budget=0.3), growing(rule="norm")])
    second = fit(folder, "b", [ReplaySchedule(first["log_dir"])])
    (folder / f"{rank}.json").write_text(json.dumps({"first": first, "second": second, "opened": sorted(set(opened))}))
