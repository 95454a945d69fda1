"""A tiny real training with real trials, which writes the log that a controller would.

It is not a controller: it searches once a stage, on a small regression, in a second. What it writes is measured.
"""

import csv
import time

import torch
from torch import nn

from autotune.decision import Decision, DecisionLog


class TinyRun:
    """Trains; ``decisions`` holds what was written."""

    def __init__(self, folder, seed=0, stages=(20, 40, 80), horizon=8, lrs=(0.003, 0.03, 0.3, 300.0)):
        torch.manual_seed(seed)
        self.folder, self.stages, self.horizon, self.lrs, self.seed = folder, stages, horizon, lrs, seed
        self.inputs = torch.randn(512, 6)
        self.targets = torch.sin(self.inputs @ torch.randn(6, 1)) + 0.1 * torch.randn(512, 1)
        self.net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 1))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.log, self.decisions, self.rows = DecisionLog(folder / "decisions.jsonl"), [], []
        self.step, self.batch, self.trial_steps, self.started = 0, 16, 0, time.perf_counter()

    def write(self, *args, **kwargs):
        decision = Decision(*args, step=self.step, **kwargs)
        self.decisions.append(decision)
        self.log.write(decision)

    def run(self):
        total = sum(self.stages)
        horizon = {"unit": "steps", "total": total}
        numbers = {"controller": "TinyRun", "search_budget": 0.6, "seed": self.seed, "monitor": "val_loss"}
        numbers |= {"mode": "min", "horizon": horizon, "versions": {"torch": torch.__version__}, "batch_size": 16}
        self.write("setup", "begin", f"tuning begins; the end is update {total}", numbers=numbers)
        for index, length in enumerate(self.stages):
            self.search(index)
            self.stage(index, length)
            self.grow()
        seconds = time.perf_counter() - self.started
        numbers = {"trial_steps": self.trial_steps, "real_steps": self.step, "seconds": seconds}
        self.write("finish", "end", "the horizon is reached", numbers=numbers | {"final_loss": self.loss()})
        names = sorted({name for row in self.rows for name in row})
        with open(self.folder / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        return self

    def loss(self):
        with torch.no_grad():
            return nn.functional.mse_loss(self.net(self.inputs[:128]), self.targets[:128]).item()

    def update(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        index = torch.randint(128, 512, (self.batch,))
        loss = nn.functional.mse_loss(self.net(self.inputs[index]), self.targets[index])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def search(self, index):
        began, start = time.perf_counter(), self.loss()
        saved = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        candidates = []
        for lr in self.lrs:
            curve, status, reason = [], "finished", ""
            for step in range(self.horizon):
                curve.append([step, self.update(lr * (1 - step / self.horizon))])
                if not curve[-1][1] < 50:
                    status, reason = "diverged", "the loss left every bound"
                    break
                if step == self.horizon // 2 and candidates and curve[-1][1] > 2 * candidates[-1]["loss"]:
                    status, reason = "stopped", "worse than the candidate before it"
                    break
            numbers = {"lr": lr, "horizon_steps": self.horizon, "steps": len(curve), "curve": curve}
            candidates.append(numbers | {"loss": self.loss(), "status": status, "reason": reason})
            self.net.load_state_dict(saved)
        cost = sum(candidate["steps"] for candidate in candidates)
        best = min((c for c in candidates if c["status"] == "finished"), key=lambda c: c["loss"])
        previous = self.optimizer.param_groups[0].get("kept", None)
        action = "keep_lr" if best["lr"] == previous else "set_lr"
        self.optimizer.param_groups[0]["kept"] = best["lr"]
        self.trial_steps += cost
        grid = torch.logspace(-3, 0, 25).tolist()
        xs = torch.log(torch.tensor([c["lr"] for c in candidates if c["status"] == "finished"]))
        ys = torch.tensor([c["loss"] for c in candidates if c["status"] == "finished"])
        ys = (ys - ys.min()) / (start - ys.min())
        weights = torch.softmax(-((torch.log(torch.tensor(grid))[:, None] - xs) ** 2), dim=1)
        mean = weights @ ys
        sd = ((weights * (ys - mean[:, None]) ** 2).sum(1)).sqrt() + 0.01
        posterior = {"lr": grid, "mean": mean.tolist(), "sd": sd.tolist(), "acquisition": (mean - sd).tolist()}
        numbers = {"index": index, "lr": best["lr"], "previous_lr": previous}
        numbers |= {"horizon_steps": self.horizon, "initial_loss": start, "candidates": candidates}
        numbers |= {"posterior": posterior, "seconds": time.perf_counter() - began}
        reason = f"trial at {best['lr']} ended at {best['loss']:.4f}, lowest of {len(candidates)} & < the start"
        self.write("search", action, reason, numbers=numbers, cost_steps=float(cost))

    def stage(self, index, length):
        lr, before = self.optimizer.param_groups[0]["kept"], self.loss()
        self.write("stage", "begin", f"stage {index + 1} of {length} updates", numbers={"index": index})
        end, prediction = self.step + length, before * 0.8
        numbers = {"stage": index, "at_step": self.step, "target_step": end, "prediction": prediction}
        numbers |= {"low": before * 0.5, "high": before * 1.05, "level": 0.9, "family": "exponential"}
        self.write("forecast", "predict", "four fifths of the loss at the stage's start", numbers=numbers)
        for _ in range(length):
            self.rows.append({"step": self.step, "train_loss": self.update(lr), "autotune/lr": lr})
            if self.step % 10 == 9:
                self.rows.append({"step": self.step, "val_loss": self.loss()})
            self.step += 1
        loss = self.loss()
        numbers = {"index": index, "start_step": end - length, "end_step": end, "loss": loss}
        inside = before * 0.5 <= loss <= before * 1.05
        numbers |= {"previous_loss": before, "prediction": prediction, "inside": inside, "evidence": []}
        self.write("stage", "end", f"loss {loss:.4f} after {before:.4f}", numbers=numbers)

    def grow(self):
        numbers = {"batch_size": 2 * self.batch, "previous_batch_size": self.batch, "noise_scale": 2.5 * self.batch}
        self.batch *= 2
        self.write("batch", "grow", f"noise scale is above {self.batch} examples", numbers=numbers)
