"""Every argument from YAML and from the command line; a printed configuration is a configuration."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import yaml

from autotune import read_decisions
from autotune.callbacks import AutoLRS, DecisionLogger, ReplaySchedule

# LightningCLI itself uses what jsonargparse has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "examples" / "config.yaml")
QUICK = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
QUICK += ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=30"]


@pytest.fixture
def main(monkeypatch):
    spec = importlib.util.spec_from_file_location("cli_example", ROOT / "examples" / "cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(args):
        monkeypatch.setattr("sys.argv", ["cli.py", *args])
        return module.main()

    return run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def the(cls, cli):
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, cls))


def test_the_example_config_trains_and_writes_a_log(main, tmp_path):
    cli = main(["fit", "--config", CONFIG, *QUICK])
    assert the(AutoLRS, cli).settings.monitor == "val_loss"
    log = the(DecisionLogger, cli).path
    assert (tmp_path / log).parent.parent.parent.name == "autotune_logs"
    assert read_decisions(log)[-1].kind == "finish"


def test_callbacks_are_added_on_the_command_line(main):
    given = ["--trainer.callbacks+=autotune.callbacks.AutoLRS", "--trainer.callbacks.search_budget=0.3"]
    given += ["--trainer.callbacks.objective=forecast", "--trainer.callbacks.min_lr=1e-5"]
    given += ["--trainer.callbacks+=autotune.callbacks.DecisionLogger"]
    cli = main(["fit", *given, *QUICK, "--trainer.fast_dev_run=true"])
    settings = the(AutoLRS, cli).settings
    assert (settings.search_budget, settings.objective, settings.min_lr) == (0.3, "forecast", 1e-5)
    assert the(DecisionLogger, cli).path is None


OTHER = {
    "min_lr": 1e-5,
    "max_lr": 0.5,
    "search_budget": 0.2,
    "objective": "forecast",
    "search": "every_stage",
    "monitor": "val_accuracy",
    "mode": "max",
    "seed": 7,
    "proposals": "grid",
    "stop_early": False,
}


def printed(main, capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_every_argument_can_be_set_and_the_printed_configuration_round_trips(main, capsys, tmp_path):
    assert set(OTHER) == set(inspect.signature(AutoLRS).parameters)
    config = yaml.safe_load(Path(CONFIG).read_text())
    config["trainer"]["callbacks"][0]["init_args"] = OTHER
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    first = printed(main, capsys, "--config", "mine.yaml")
    assert yaml.safe_load(first)["trainer"]["callbacks"][0]["init_args"] == OTHER
    (tmp_path / "again.yaml").write_text(first)
    assert printed(main, capsys, "--config", "again.yaml") == first


def test_every_argument_from_the_command_line(main, capsys):
    flags = [f"--trainer.callbacks.{name}={value}" for name, value in OTHER.items()]
    text = printed(main, capsys, "--trainer.callbacks+=autotune.callbacks.AutoLRS", *flags)
    assert yaml.safe_load(text)["trainer"]["callbacks"][0]["init_args"] == OTHER


def test_a_found_schedule_is_replayed_from_the_command_line(main):
    cli = main(["fit", "--config", CONFIG, *QUICK])
    log = the(DecisionLogger, cli).path
    given = ["--trainer.callbacks+=autotune.callbacks.ReplaySchedule", f"--trainer.callbacks.path={log}"]
    again = main(["fit", *given, *QUICK])
    assert the(ReplaySchedule, again).lr == the(AutoLRS, cli).lr


def test_a_wrong_value_is_named(main, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.callbacks+=autotune.callbacks.AutoLRS", "--trainer.callbacks.search=sometimes"])
    assert "every_stage" in capsys.readouterr().err
