"""Every argument from YAML and from the command line; a printed configuration is a configuration."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import yaml

from autotune import Decision, read_decisions
from autotune import callbacks as ours
from autotune.callbacks import AutoLRS, DecisionLogger, ReplaySchedule
from autotune.decision import encode

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


#: For every callback every argument, at another value than its default.
OTHER = {
    "AutoLRS": {
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
        "climb": False,
        "forecasts": False,
    },
    "AdaptiveBatchSize": {
        "max_batch_size": 512,
        "rule": "norm",
        "lr_scaling": "linear",
        "every_n_steps": 3,
        "noise_multiple": 2.0,
        "eta": 0.3,
        "rest_updates": 7,
        "decay_growth": 2.0,
        "loss_reduction": "sum",
    },
    "GradientNoiseMonitor": {
        "every_n_steps": 5,
        "source": "microbatch",
        "loss_reduction": "sum",
        "preconditioned": True,
        "by_module": True,
        "decay": 0.5,
        "level": 0.9,
    },
    "DecisionLogger": {},
    "ReplaySchedule": {"path": "log.jsonl"},
}


@pytest.fixture
def log(tmp_path):
    """A decision log, which ReplaySchedule reads when it is made."""
    setup = {"shape": {"form": "hold"}, "horizon": {"unit": "steps", "total": 8, "updates": 8}}
    decisions = [Decision("setup", "begin", "", 0, numbers=setup)]
    decisions.append(Decision("search", "set_lr", "", 0, numbers={"lr": 0.1}))
    (tmp_path / "log.jsonl").write_text("".join(encode(decision) + "\n" for decision in decisions))


def printed(main, capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_no_callback_and_no_argument_is_left_out():
    assert set(OTHER) == set(ours.__all__)
    for name, arguments in OTHER.items():
        parameters = inspect.signature(getattr(ours, name)).parameters
        assert list(arguments) == list(parameters), name
        assert not any(parameters[key].default == value for key, value in arguments.items())


def test_every_argument_from_yaml_and_the_printed_configuration_round_trips(main, capsys, tmp_path, log):
    config = yaml.safe_load(Path(CONFIG).read_text())
    given = [{"class_path": f"autotune.callbacks.{name}", "init_args": kwargs} for name, kwargs in OTHER.items()]
    config["trainer"]["callbacks"] = given
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    first = printed(main, capsys, "--config", "mine.yaml")
    found = yaml.safe_load(first)["trainer"]["callbacks"]
    assert [one["class_path"] for one in found] == [one["class_path"] for one in given]
    assert [one.get("init_args", {}) for one in found] == list(OTHER.values())
    (tmp_path / "again.yaml").write_text(first)
    assert printed(main, capsys, "--config", "again.yaml") == first


def test_every_argument_from_the_command_line(main, capsys, tmp_path, log):
    flags = []
    for name, arguments in OTHER.items():
        flags.append(f"--trainer.callbacks+=autotune.callbacks.{name}")
        flags += [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]
    text = printed(main, capsys, *flags)
    found = yaml.safe_load(text)["trainer"]["callbacks"]
    assert {one["class_path"].rpartition(".")[2]: one.get("init_args", {}) for one in found} == OTHER
    (tmp_path / "again.yaml").write_text(text)
    assert printed(main, capsys, "--config", "again.yaml") == text


def test_defaults_need_no_word(main, capsys, tmp_path):
    for name in OTHER:
        if name != "ReplaySchedule":
            text = printed(main, capsys, f"--trainer.callbacks+=autotune.callbacks.{name}")
            (tmp_path / "again.yaml").write_text(text)
            assert printed(main, capsys, "--config", "again.yaml") == text


def test_both_controllers_and_the_monitor_train_from_the_command_line(main):
    names = ("AutoLRS", "AdaptiveBatchSize", "GradientNoiseMonitor", "DecisionLogger")
    given = [f"--trainer.callbacks+=autotune.callbacks.{name}" for name in names]
    cli = main(["fit", *given, *QUICK])
    kinds = {decision.kind for decision in read_decisions(the(DecisionLogger, cli).path)}
    assert kinds >= {"setup", "stage", "finish"}


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
