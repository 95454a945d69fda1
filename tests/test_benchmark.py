"""The benchmark's committed lines: of the workloads as they are now, and what the README's table says."""

import csv
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "examples" / "benchmark"
MODULES = (
    "data", "models", "workloads", "suite", "results", "rivals", "report", "run", "growth_runs", "growth_table"
)  # fmt: skip
REPORTING = [60, 61, 62, 63, 64]
EARLIER = [30, 31, 32, 33, 34, 40, 41]
GROUPS = [
    *[("runs-cpu.csv", "suite"), ("runs-seen-cpu.csv", "seen"), ("runs-held-out-cpu.csv", "held-out")],
    *[("runs-unscaled-cpu.csv", "unscaled"), ("runs-optimizers-cpu.csv", "optimizers")],
]
GROWTH_SEEDS = [10, 11, 12, 13, 14]
TABLE = (ROOT / "README.md").read_text(encoding="utf-8").split("**The benchmark's eighteen workloads**")[1]


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's scripts as modules, and none of their plain names left behind."""
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARK))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        import growth_runs
        import growth_table
        import report
        import results
        import run
        import suite

        growth = {"growth_runs": growth_runs, "growth_table": growth_table}
        yield {"report": report, "results": results, "run": run, "suite": suite, **growth}
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def committed(benchmark):
    return benchmark["results"].load(BENCHMARK / "results", list(benchmark["suite"].SUITE.values()), "cpu")


def cells(first):
    """The cells of the table's row that begins so, without emphasis."""
    row = next(line for line in TABLE.splitlines() if line.replace("*", "").startswith(f"| {first} |"))
    return [cell.strip(" *`") for cell in row.strip("| ").split("|")]


@pytest.mark.parametrize(("file", "group"), GROUPS)
def test_committed_lines_are_of_the_present_workloads(benchmark, file, group):
    keys = {name: workload.key() for name, workload in benchmark["suite"].SETS[group].items()}
    with (BENCHMARK / "results" / file).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["workload"] for row in rows} == set(keys)
    assert {(row["workload"], row["key"]) for row in rows} == set(keys.items())


def test_the_readme_says_what_the_committed_lines_say(benchmark, committed):
    report = benchmark["report"]
    ratios = []
    for workload, runs in committed.items():
        name, best = report.best_of_sweep(runs, REPORTING)
        ratios.append(report.ratio(report.means(runs, REPORTING)["autolrs"], best))
        _, said, ours, *_ = cells(workload)
        assert said == f"{best:.4g} ({name.split('/')[1]})"
        assert ours == f"{ratios[-1]:.3f}"
    assert cells("geometric mean")[2] == f"{report.geometric(ratios):.3f}"
    assert cells("worst")[2] == f"{max(ratios):.3f}"


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (EARLIER, "the mean is {mean:.3f}, with `finetune` at {finetune:.3f} and `resnet_adamw` at {resnet_adamw:.3f}"),
        (
            EARLIER + REPORTING,
            "on all twelve {mean:.3f}, with `finetune` at {finetune:.3f}, `resnet_adamw` at {resnet_adamw:.3f} and no "
            "other above 1.08",
        ),
    ],
)
def test_the_readme_says_what_the_earlier_seeds_said(benchmark, committed, seeds, said):
    report = benchmark["report"]
    ratios = {w: report.means(runs, seeds)["autolrs"] / report.best_of_sweep(runs, seeds)[1]
              for w, runs in committed.items()}  # fmt: skip
    assert said.format(mean=report.geometric(list(ratios.values())), **ratios) in " ".join(TABLE.split())
    if seeds != EARLIER:
        assert max(ratio for name, ratio in ratios.items() if name not in ("finetune", "resnet_adamw")) < 1.08


@pytest.mark.parametrize(("first", "last", "count"), [(60, 64, 90), (30, 34, 90)])
def test_the_readme_counts_the_pairs_of_the_committed_lines(benchmark, committed, first, last, count):
    rivals = ["prodigy", "dadapt", "schedule_free", "one_cycle", "plateau", "greedy", "constant", "forecast"]
    row = re.search(rf"\| `AutoLRS` is better on seeds {first} to {last} .*", TABLE)
    said = re.findall(rf"\d+ of {count}", row[0])
    assert said == [benchmark["report"]._beaten(committed, rival, list(range(first, last + 1))) for rival in rivals]
    won = sum(int(pairs.split()[0]) for pairs in said)
    if first == 60:
        assert f"in {won} of 720 cases" in " ".join(TABLE.split())


def test_the_readme_counts_the_pairs_of_validated_runs(benchmark, committed):
    validated = {name: {**runs, "autolrs": runs["autolrs_validated"]} for name, runs in committed.items()}
    section = " ".join(TABLE.split("**Validated as users validate.**")[1].split("\n\n")[0].split())
    counts = {"dadapt": 36, "one_cycle": 36, "constant": 36, "forecast": 36, "prodigy": 35, "plateau": 35,
              "greedy": 35, "schedule_free": 34}  # fmt: skip
    for phrase in ("36 against D-Adapt, one-cycle, constant and as published", "35 against Prodigy, plateau and greedy",
                   "34 against schedule-free"):  # fmt: skip
        assert phrase in section
    for rival, won in counts.items():
        assert benchmark["report"]._beaten(validated, rival, [30, 31]) == f"{won} of 36"


@pytest.mark.parametrize(
    ("group", "begins"),
    [
        ("held-out", "**Eight workloads on which"),
        ("seen", "**Twenty-eight that were"),
        ("unscaled", "**Ten in units of their own"),
        ("optimizers", "**Ten under optimizers"),
    ],
)
def test_the_readme_says_what_the_lines_outside_the_suite_say(benchmark, group, begins):
    report, workloads = benchmark["report"], benchmark["suite"].SETS[group]
    lines = benchmark["results"].load(BENCHMARK / "results", list(workloads.values()), f"{group}-cpu")
    section = " ".join(TABLE.split(begins)[1].split("\n\n")[0].split())
    ratios = {}
    for name, runs in lines.items():
        ratios[name] = report.means(runs, [0, 1])["autolrs"] / report.best_of_sweep(runs, [0, 1])[1]
    said = {name: float(value) for name, value in re.findall(r"`(\w+)` (\d\.\d{3})", section)}
    assert said == {name: round(ratios[name], 3) for name in workloads}
    assert f"geometric mean is {report.geometric(list(ratios.values())):.3f}" in section
    assert f"median {statistics.median(ratios.values()):.3f}" in section


@pytest.mark.parametrize(("group", "row"), [("seen", "the twenty-eight"), ("held-out", "the eight held out")])
def test_the_readme_says_what_the_rivals_do_outside_the_suite(benchmark, group, row):
    report, workloads = benchmark["report"], benchmark["suite"].SETS[group]
    lines = benchmark["results"].load(BENCHMARK / "results", list(workloads.values()), f"{group}-cpu")
    made = [line.strip("| ").split(" | ") for line in report.table(lines, [0, 1]).splitlines()]
    mean = next(line for line in made if line[0] == "**geometric mean**")
    better = made[-1]
    means = {name: value.strip("*") for name, value in zip(made[0], mean, strict=False)}
    pairs = dict(zip(made[0], better, strict=True))
    names = ["prodigy", "dadapt", "schedule_free", "one_cycle", "plateau", "greedy", "constant", "forecast"]
    section = TABLE.split("**The rivals on the twenty-eight")[1].split("\n\n")[1].splitlines()
    at = next(index for index, line in enumerate(section) if line.startswith(f"| {row} |"))
    assert section[at] == "| " + " | ".join([row, means["autolrs"], *(means[name] for name in names)]) + " |"
    assert section[at + 1] == "| `AutoLRS` is better | | " + " | ".join(pairs[name] for name in names) + " |"


def test_the_readme_says_what_the_growth_lines_say(benchmark):
    runs, suite = benchmark["growth_runs"].load(BENCHMARK / "results"), benchmark["suite"].SUITE
    made = benchmark["growth_table"].table(list(suite), GROWTH_SEEDS, runs).splitlines()[2:]
    said = TABLE.split("| workload (best fixed batch) |")[1].split("\n\n")[0].replace("*", "").replace(" %", "%")
    rows = said.splitlines()[2:]
    assert len(rows) == len(suite) + 1
    for row, line in zip(rows, made, strict=False):
        expected = [cell.strip() for cell in line.strip("|").split("|")]
        # What a batch saves by not growing, and what the same run saves twice over, is left out.
        expected[1], expected[3] = expected[1].split(",")[0], expected[3].split(",")[0]
        assert [cell.strip() for cell in row.strip("|").split("|")] == expected


def test_growth_lines_hold_what_files_do_and_nothing_of_other_definitions(benchmark, tmp_path):
    growth, results, workload = benchmark["growth_runs"], benchmark["results"], benchmark["suite"].SUITE["parity"]
    known = {"workload": "parity", "key": workload.key(), "batch": 64, "lr": growth.rates()["parity"]["64"]}
    made = {"loss": 0.25, "updates": 90, "seconds": 1.5, "origin": {"commit": "a", "machine": "m", "versions": "v"}}
    ours = {"noise_multiple": 0.25, "lr_scaling": "auto", "decay_growth": 3.0}
    runs = {
        ("parity", "fixed", 64, 3): known | made | {"rule": "fixed", "seed": 3},
        ("parity", "noise_scale", 64, 3): known | made | ours | {"rule": "noise_scale", "seed": 3},
    }
    for (_, rule, batch, seed), run in runs.items():
        results.keep(growth.place(tmp_path, workload, rule, batch, seed), run)
    assert growth.load(tmp_path) == runs
    growth.write_lines(runs, tmp_path / growth.LINES)
    for file in tmp_path.glob("growth/*/*.json"):
        file.unlink()
    assert growth.load(tmp_path) == runs
    others = {
        ("parity", "fixed", 64, 4): known | made | {"rule": "fixed", "seed": 4, "lr": 1.5},
        ("parity", "fixed", 64, 5): known | made | {"rule": "fixed", "seed": 5, "key": "another"},
        ("parity", "noise_scale", 64, 4): known | made | ours | {"rule": "noise_scale", "seed": 4, "decay_growth": 4.0},
    }
    growth.write_lines(runs | others, tmp_path / growth.LINES)
    assert growth.load(tmp_path) == runs


def result(workload, method, seed, loss, **more):
    numbers = {"budget": workload.steps, "updates": 90, "cost": 99.5, "trial_steps": 8, "seconds": 1.5}
    named = {"workload": workload.name, "key": workload.key(), "method": method, "seed": seed, "loss": loss}
    return named | numbers | {"origin": {"commit": "a", "machine": "m, 2 cores", "versions": "v"}} | more


def test_lines_hold_what_files_do_but_curves(benchmark, tmp_path):
    results, workload = benchmark["results"], benchmark["suite"].SUITE["parity"]
    one = result(workload, "autolrs", 3, 0.25, curve=[[1, 2.0]])
    results.keep(results.path_of(tmp_path, workload, "autolrs", 3), one)
    benchmark["run"].job("of no such name", workload, 3, tmp_path)
    found = results.load(tmp_path, [workload], "cpu")["parity"]
    assert found["autolrs"] == {3: one}
    results.write_lines({"parity": found}, tmp_path / "runs-cpu.csv")
    for file in tmp_path.glob("*/*.json"):
        file.unlink()
    again = results.load(tmp_path, [workload], "cpu")["parity"]
    assert again["autolrs"][3] == {key: value for key, value in one.items() if key != "curve"}
    failed = again["of no such name"][3]
    assert results.loss_of(failed) == float("inf"), "a run that crashed has lost"
    assert failed["error"] == "KeyError('of no such name')"


def test_a_file_counts_before_a_line_and_another_definition_not_at_all(benchmark, tmp_path):
    results, workload = benchmark["results"], benchmark["suite"].SUITE["parity"]
    results.write_lines(
        {"parity": {"autolrs": {1: result(workload, "autolrs", 1, 1.0), 2: result(workload, "autolrs", 2, 2.0)},
                    "greedy": {1: result(workload, "greedy", 1, 1.0, key="of-long-ago")}}},
        tmp_path / "runs-cpu.csv",
    )  # fmt: skip
    results.keep(results.path_of(tmp_path, workload, "autolrs", 2), result(workload, "autolrs", 2, 0.5))
    found = results.load(tmp_path, [workload], "cpu")["parity"]
    assert {seed: run["loss"] for seed, run in found["autolrs"].items()} == {1: 1.0, 2: 0.5}
    assert "greedy" not in found


def test_names_of_methods(benchmark):
    run = benchmark["run"]
    assert run.wanted(["hold", "autolrs"], {}, "parity") == [*(f"sweep/hold/{i}" for i in range(7)), "autolrs"]
    assert len(run.wanted(["sweep"], {}, "parity")) == 21
    runs = {f"sweep/linear/{i}": {0: {"loss": abs(i - 4.2)}, 1: {"loss": 1.0}} for i in range(7)}
    runs["sweep/hold/0"] = {0: {"loss": 0.0}}
    assert run.wanted(["top3"], runs, "parity") == ["sweep/linear/4", "sweep/linear/5", "sweep/linear/3"]
    with pytest.raises(ValueError, match="parity: run the sweep on seeds"):
        run.wanted(["top3"], {}, "parity")


def test_a_twin_is_another_workload(benchmark):
    workload = benchmark["suite"].SUITE["gpt_sgd"]
    twins = [workload, workload.cut(600), workload.scaled("gpu"), workload.scaled("gpu").cut(600)]
    assert [twin.name for twin in twins] == ["gpt_sgd", "gpt_sgd-600", "gpt_sgd-gpu", "gpt_sgd-gpu-600"]
    assert len({twin.key() for twin in twins}) == 4
    assert twins[1].steps == 600
    from rivals import sweep_lrs

    assert sweep_lrs(twins[1]) == sweep_lrs(workload)


def test_an_unknown_workload_is_refused(benchmark, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "--workloads", "gpt"])
    with pytest.raises(SystemExit, match="no workload gpt in the suite set; it has gpt_adamw, "):
        benchmark["run"].main()


OUTSIDE = re.findall(r'_W\("(\w+)", "(\w+)"', (BENCHMARK / "suite.py").read_text().split("SEEN: dict")[1])
assert len(OUTSIDE) >= 56


@pytest.mark.parametrize(("name", "source"), OUTSIDE)
def test_a_workload_outside_the_suite_learns(benchmark, name, source):
    if source == "mnist1d":
        pytest.importorskip("mnist1d")
    from rivals import sweep_lrs

    workload = {name: one for group in benchmark["suite"].SETS.values() for name, one in group.items()}[name]
    typical = workload.optimizer in ("Adadelta", "RAdam") or name in benchmark["suite"].UNSCALED
    task, batch = workload.build(0), next(iter(workload.train_loader(0)))
    optimizer = task.plain_optimizer()
    optimizer.param_groups[0]["lr"] = sweep_lrs(workload)[2] if typical else 1e-3
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = task.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    whole = list(workload.val_loader())
    assert sum(len(part[0]) for part in whole) >= 100
    assert all(torch.isfinite(task.loss(part)) for part in whole)


def test_a_report_of_lines_alone(benchmark, tmp_path, monkeypatch, capsys):
    results, workload = benchmark["results"], benchmark["suite"].SUITE["parity"]
    methods = {"sweep/linear/3": 0.5, "sweep/hold/3": 0.4, "autolrs": 0.42}
    runs = {method: {7: result(workload, method, 7, loss)} for method, loss in methods.items()}
    results.write_lines({"parity": runs}, tmp_path / "runs-cpu.csv")
    monkeypatch.setattr("sys.argv", ["report.py", "--seeds", "7", "--results", str(tmp_path)])
    benchmark["report"].main()
    said = capsys.readouterr().out
    assert "| parity | 0.4 (hold/3) | 1.050 |" in said
    assert "no figure of parity" in said
    assert (tmp_path / "table-cpu.md").read_text().strip() in said
    assert len((tmp_path / "runs-cpu.csv").read_text().splitlines()) == 4


def test_a_report_of_one_workload_keeps_the_lines_of_the_others(benchmark, tmp_path, monkeypatch):
    results, suite = benchmark["results"], benchmark["suite"].SUITE
    runs = {
        name: {method: {7: result(suite[name], method, 7, 0.5)} for method in ("sweep/hold/3", "autolrs")}
        for name in ("parity", "overfit")
    }
    results.write_lines(runs, tmp_path / "runs-cpu.csv")
    before = (tmp_path / "runs-cpu.csv").read_text()
    options = ["--seeds", "7", "--results", str(tmp_path), "--workloads", "parity"]
    monkeypatch.setattr("sys.argv", ["report.py", *options])
    benchmark["report"].main()
    assert (tmp_path / "runs-cpu.csv").read_text() == before
    assert not (tmp_path / "table-cpu.md").exists()
