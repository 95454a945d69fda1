"""Every code block of the README, in order, in one directory: run, or (an install) checked word by word."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from real_run import Net
from torch.utils.data import DataLoader, TensorDataset

from autotune.report import cli

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)


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


def python(code, names):
    fresh = {"L": L, "torch": torch, "model": Net(), "datamodule": Data()}
    exec(compile(code, "README.md", "exec"), fresh)
    names.update({name for name in fresh if not name.startswith("__")})
    if "Model" in fresh:
        two_hooks(fresh["Model"])


def two_hooks(cls):
    """The block that defines them says when they are called: around trials, and again and again."""
    from autotune.snapshot import Snapshot

    model = cls()
    model.meter, model.layer = {"seen": 1}, torch.nn.Linear(1, 1)
    snapshot = Snapshot.of_training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    snapshot.capture()
    for _ in range(2):
        model.meter["seen"] = 7
        snapshot.restore()
        assert model.meter == {"seen": 1}


def shell(line, monkeypatch):
    """One command line; what nobody here knows how to check is a failure."""
    for command in line.split(" && "):
        program, *arguments = shlex.split(command)
        if program == "autotune":
            assert cli.main(arguments) == 0
        elif program == "pip":
            installs(arguments)
        elif program == "python":
            script, *options = arguments
            example(script, options, monkeypatch)
        else:
            # The line with pytest in it is what CI runs, taken from here word by word.
            assert (program, arguments) == ("pytest", []), f"no check for: {command}"
            assert "pytest" in (ROOT / ".ci" / "run").read_text()


def installs(arguments):
    """``pip install -c constraints.txt -e ".[extra]"``: the file is there and the extras exist."""
    assert arguments[:2] == ["install", "-c"]
    assert (ROOT / arguments[2]).is_file()
    assert arguments[3] == "-e"
    asked = re.fullmatch(r"\.\[([\w,]+)\]", arguments[4]).group(1).split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(asked) <= set(project["optional-dependencies"])
    assert len(arguments) == 5


#: What makes an example short enough for a test; everything else stays as it stands in the README.
SHORTER = {
    "examples/cli.py": ["--trainer.limit_train_batches=20", "--trainer.max_epochs=1"],
    "examples/quickstart.py": ["--max-steps", "60"],
}


def example(script, options, monkeypatch):
    monkeypatch.setattr("sys.argv", [script, *options, *SHORTER[script]])
    runpy.run_path(script, run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("benchmark", "images"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    names = set()
    for language, code in BLOCKS:
        if language == "python":
            python(code, names)
        else:
            assert language == "sh", f"no check for a block in {language or 'no language'}"
            for line in code.splitlines():
                shell(line, monkeypatch)
    assert len(BLOCKS) >= 14
    assert {"AutoLRS", "AdaptiveBatchSize", "DecisionLogger", "ReplaySchedule", "load_schedule"} <= names
    assert (tmp_path / "schedule.csv").is_file()
    assert (tmp_path / "schedule.json").is_file()
    assert list(tmp_path.glob("lightning_logs/version_*/report.html"))
    assert len(list(tmp_path.rglob("decisions.jsonl"))) >= 6


def test_no_block_escapes():
    """Every fence belongs to a block that was found, and every block says its language."""
    assert README.count("```") == 2 * len(BLOCKS)
    assert {language for language, _ in BLOCKS} == {"python", "sh"}


def test_what_is_shown_and_linked_is_there():
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(shown) >= 3
    assert all((ROOT / path).is_file() for path in shown)
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)
    }
    linked = re.findall(r"\]\(#([^)]+)\)", README)
    assert linked
    assert set(linked) <= anchors


def test_the_scripts_that_the_text_names_are_there():
    named = re.findall(r"`(?:python )?(examples/[\w/.]+\.(?:py|yaml|md))", README)
    assert len(named) >= 6
    assert all((ROOT / path).is_file() for path in named)


def test_the_support_matrix_names_nothing_that_no_test_has():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    section = README.partition("## What it works with")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([^`]+)`", section))
    assert len(named) > 40
    assert not {name for name in named if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", tests)}


def test_the_api_table_names_what_there_is():
    import importlib

    rows = re.findall(r"^\| `(autotune\.[\w.]+)(?:\([^`]*\))?` \|.*\| (.*) \|$", README, re.M)
    assert len(rows) >= 7
    for path, readable in rows:
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert found is not None
        if name.startswith(("load_", "read_")):
            from autotune import Decision
            from autotune.replay import Schedule

            found = Schedule if name == "load_schedule" else Decision
        for attribute in re.findall(r"`(\w+)", readable):
            known = hasattr(found, attribute) or attribute in getattr(found, "__annotations__", {})
            assert known or attribute in vars(found()), f"{path} has no {attribute}"
