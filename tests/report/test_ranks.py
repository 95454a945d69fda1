"""Two processes: one writes, both train alike, and a replay is the run bit for bit on both."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from autotune import read_decisions


@pytest.mark.slow
@pytest.mark.distributed
def test_rank_zero_writes_and_a_replay_is_the_run_on_every_rank(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(__file__).with_name("rank.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(tmp_path), str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert {"run/a/version_0/decisions.jsonl", "run/b/version_0/decisions.jsonl"} <= set(zero["opened"])
    assert one["opened"] == []
    for fit in ("first", "second"):
        assert zero[fit]["path"] == str(Path(zero[fit]["log_dir"]) / "decisions.jsonl")
        assert one[fit]["path"] is None
        assert one[fit]["ours"] == []
        assert "autotune/lr" in zero[fit]["ours"]
        assert "autotune/batch/batch" in zero[fit]["ours"]
        assert zero[fit]["decisions"] == one[fit]["decisions"]
        assert zero[fit]["weights"] == one[fit]["weights"]
    assert zero["first"]["weights"] == zero["second"]["weights"]
    found = read_decisions(tmp_path / "run/a/version_0")
    assert {d.kind for d in found} >= {"setup", "search", "batch", "stage", "finish"}
    assert len({json.dumps(d.to_dict()) for d in found}) == len(found)
