"""A byte-level language model on Python's own standard library, with no learning rate set anywhere.

    python examples/quickstart.py                 # one run with AutoLRS, its decisions as a table and a PNG
    python examples/quickstart.py --compare       # and the same model under a cosine at three fixed rates

Every run of a comparison costs the same in total: AutoLRS pays its trials out of it.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from autotune import Decision
from autotune.callbacks import AutoLRS

CONTEXT, BATCH, WIDTH, LAYERS, HEADS = 48, 16, 64, 2, 4
BUDGET = 0.1
COSINE_LRS = (3e-4, 1e-3, 3e-3)


class Windows(Dataset[Tensor]):
    """Every window of ``CONTEXT + 1`` bytes of a text, half a context apart."""

    def __init__(self, text: bytes) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.text) - CONTEXT - 1) // (CONTEXT // 2)

    def __getitem__(self, index: int) -> Tensor:
        start = index * (CONTEXT // 2)
        return self.text[start : start + CONTEXT + 1].long()


def standard_library() -> tuple[bytes, bytes]:
    """The standard library's sources: nine files in ten for training, the tenth for validation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = {False: [], True: []}
    for number, file in enumerate(files):
        parts[number % 10 == 0].append(file.read_bytes())
    return b"".join(parts[False]), b"".join(parts[True])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm_a(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(self.norm_b(x))


class ByteGPT(L.LightningModule):
    """A small GPT over bytes. ``configure_optimizers`` leaves torch's default rate in place."""

    def __init__(self, lr: float | None = None, cosine_steps: int = 0) -> None:
        super().__init__()
        self.lr, self.cosine_steps = lr, cosine_steps
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embed(batch[:, :-1]) + self.place.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self):
        if self.lr is None:
            return torch.optim.AdamW(self.parameters())
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        warmup = max(1, round(0.02 * self.cosine_steps))

        def shape(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.cosine_steps - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders(seed: int) -> tuple[DataLoader[Tensor], DataLoader[Tensor]]:
    train, val = standard_library()
    shuffle = torch.Generator().manual_seed(seed)
    validation = Windows(val)
    fixed = torch.utils.data.Subset(validation, range(0, len(validation), max(1, len(validation) // 512)))
    return (
        DataLoader(Windows(train), BATCH, shuffle=True, drop_last=True, generator=shuffle),
        DataLoader(fixed, 64),
    )


def fit(model: ByteGPT, steps: int, args: argparse.Namespace, callback: AutoLRS | None, folder: Path) -> float:
    """Trains for ``steps`` updates; returns the validation loss at the end."""
    train, val = loaders(args.seed)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator=args.device,
        devices=1,
        callbacks=[] if callback is None else [callback],
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
        val_check_interval=max(1, steps // 5),
        check_val_every_n_epoch=None,
        log_every_n_steps=10,
    )
    trainer.fit(model, train, val)
    return float(trainer.validate(model, val, verbose=False)[0]["val_loss"])


def auto_run(args: argparse.Namespace, folder: Path, **settings) -> tuple[float, AutoLRS]:
    """One run with AutoLRS at a total cost of ``args.max_steps``, trials included."""
    L.seed_everything(args.seed, verbose=False)
    callback = AutoLRS(search_budget=settings.pop("search_budget", BUDGET), **settings)
    steps = int(args.max_steps / (1 + callback.settings.search_budget))
    return fit(ByteGPT(), steps, args, callback, folder), callback


def cosine_run(args: argparse.Namespace, lr: float, folder: Path) -> float:
    """The same model under warm-up and cosine at one fixed peak, for as many steps in total."""
    L.seed_everything(args.seed, verbose=False)
    return fit(ByteGPT(lr, args.max_steps), args.max_steps, args, None, folder)


def print_decisions(decisions: list[Decision]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What AutoLRS decided", title_justify="left")
    for column, justify in (("step", "right"), ("what", "left"), ("LR", "right"), ("why", "left"), ("cost", "right")):
        table.add_column(column, justify=justify)
    for decision in decisions:
        lr = decision.numbers.get("lr")
        table.add_row(
            str(decision.step),
            f"{decision.kind}: {decision.action}",
            f"{lr:.3g}" if isinstance(lr, float) else "",
            decision.reason,
            f"{decision.cost_steps:.0f}" if decision.cost_steps else "",
        )
    Console().print(table)


def draw(folder: Path, decisions: list[Decision]) -> Path:
    """Loss and rate over steps, decisions marked, from the run's own CSV."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        return [step for step, _ in points], [value for _, value in points]

    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")
    top.plot(*series("train_loss"), color="0.6", linewidth=0.8, label="training")
    top.plot(*series("val_loss"), "o-", color="tab:blue", label="validation")
    bottom.plot(*series("autotune/lr"), color="tab:orange")
    for decision in decisions:
        if decision.kind == "forecast" and decision.action == "predict":
            n = decision.numbers
            error = [[n["prediction"] - n["low"]], [n["high"] - n["prediction"]]]
            top.errorbar([n["target_step"]], [n["prediction"]], yerr=error, color="tab:green", marker="x", capsize=3)
    colours = {
        "search": "tab:red",
        "stage": "0.75",
        "rollback": "tab:purple",
        "plateau": "tab:brown",
        "setback": "tab:brown",
        "climb": "tab:orange",
    }
    seen: set[str] = set()
    for decision in decisions:
        if decision.kind in colours and decision.action not in ("begin", "look"):
            for axis in (top, bottom):
                label = decision.kind if decision.kind not in seen and axis is bottom else None
                axis.axvline(decision.step, color=colours[decision.kind], linestyle=":", label=label)
            seen.add(decision.kind)
    top.set(ylabel="loss (nats per byte)", title="green: stage-end losses as predicted, with their 80 % intervals")
    bottom.set(xlabel="real updates", ylabel="learning rate")
    top.legend(), bottom.legend()
    path = folder / "quickstart.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=4000, help="total cost in steps, trials included (4000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or gpu (auto)")
    parser.add_argument("--compare", action="store_true", help="also train under a cosine at three fixed rates")
    parser.add_argument("--out", type=Path, default=None, help="folder for logs and figure (a new temporary one)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    if args.max_steps < 20:
        parser.error("--max-steps must be at least 20")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*You already called `self.log.*")
    # So small a model gains nothing from a second thread, and loses much to whatever else runs on the machine.
    torch.set_num_threads(1)
    folder = args.out or Path(tempfile.mkdtemp(prefix="autotune-quickstart-"))

    began = time.monotonic()
    loss, callback = auto_run(args, folder / "autolrs")
    print_decisions(callback.decisions)
    cost = sum(d.cost_steps for d in callback.decisions if d.kind != "rollback")
    print(f"validation loss {loss:.4f} after {args.max_steps} steps in total, about {cost:.0f} of them for searching")
    print(f"decisions: {folder / 'autolrs' / 'decisions.jsonl'}")
    print(f"figure:    {draw(folder / 'autolrs', callback.decisions)}")
    print(f"wall time: {time.monotonic() - began:.0f} s")
    if args.compare:
        results = {"AutoLRS": loss}
        for lr in COSINE_LRS:
            results[f"cosine, peak {lr:g}"] = cosine_run(args, lr, folder / f"cosine-{lr:g}")
        for name, value in sorted(results.items(), key=lambda item: item[1]):
            print(f"{name:20s} validation loss {value:.4f}")


if __name__ == "__main__":
    main()
