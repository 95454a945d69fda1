"""The code blocks of the README's sections on looking at runs, in order, in one directory."""

import re
import shlex
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from real_run import Net
from torch.utils.data import DataLoader, TensorDataset

from autotune.report import cli

ROOT = Path(__file__).parents[2]
SECTIONS = ["Dashboards", "Reading the report", "Replay"]


class Data(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        inputs = torch.randn(800, 8, generator=torch.Generator().manual_seed(0))
        self.sets = (
            TensorDataset(inputs[:600], inputs[:600, :3].argmax(1)),
            TensorDataset(inputs[600:], inputs[600:, :3].argmax(1)),
        )

    def train_dataloader(self):
        return DataLoader(self.sets[0], 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.sets[1], 100)


def blocks(section):
    text = (ROOT / "README.md").read_text()
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.S | re.M).group(1)
    return re.findall(r"^```(\w+)\n(.*?)^```", body, re.S | re.M)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    ran = 0
    for section in SECTIONS:
        for language, code in blocks(section):
            if language == "python":
                exec(
                    compile(code, f"README.md, {section}", "exec"),
                    {"L": L, "torch": torch, "model": Net(), "datamodule": Data()},
                )
            else:
                assert language == "sh"
                for line in code.splitlines():
                    program, *arguments = shlex.split(line)
                    assert program == "autotune"
                    assert cli.main(arguments) == 0
            ran += 1
    assert ran >= 6
    assert (tmp_path / "schedule.csv").is_file()
    assert (tmp_path / "schedule.json").is_file()
    assert list(tmp_path.glob("lightning_logs/version_*/report.html"))


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_command_lines_of_lightning_cli_run(tmp_path, monkeypatch):
    import runpy

    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    for line in blocks("CLI and YAML")[0][1].splitlines():
        program, script, *arguments = shlex.split(line)
        assert program == "python"
        # As they stand, only shorter.
        shorter = ["--trainer.limit_train_batches=20", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
        monkeypatch.setattr("sys.argv", [script, *arguments, *shorter])
        runpy.run_path(script, run_name="__main__")
    assert len(list(tmp_path.rglob("decisions.jsonl"))) == 2


def test_the_pictures_are_there():
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert all((ROOT / path).is_file() for path in shown)
