"""The command as a new user would try it, errors included."""

import csv
import os
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from real_run import train

from autotune.callbacks import AutoLRS
from autotune.report import explain, figures
from autotune.report.cli import main
from autotune.report.watch import ReportServer


def run(*argv):
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "autotune.report.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("command", [[], ["report"], ["watch"], ["explain"], ["replay"]])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: autotune" in capsys.readouterr().out


def test_no_command_tells_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_report_writes_beside_the_log_or_where_it_is_told(tiny, tmp_path, capsys):
    assert main(["report", str(tiny.folder), "-o", str(tmp_path / "mine.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine.html")
    assert main(["report", str(tiny.folder / "decisions.jsonl")]) == 0
    assert (tiny.folder / "report.html").stat().st_size < 10_000_000
    assert main(["report", str(tiny.folder), "-o", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()


def test_a_report_fetches_nothing(tiny, tmp_path):
    import re

    main(["report", str(tiny.folder), "-o", str(tmp_path / "r.html")])
    text = (tmp_path / "r.html").read_text()
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"'](?!data:)", text)
    assert not re.findall(r"@import|url\((?!data:|#)", text.split("</style>")[0])


def test_log_text_cannot_become_markup(tmp_path):
    from autotune import Decision
    from autotune.decision import encode
    from autotune.report.page import page
    from autotune.report.reading import read_run

    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    decisions = [
        Decision(
            "search", evil, evil, 0, numbers={"lr": 0.1, "candidates": [{"lr": 0.1, "loss": 1.0, "reason": evil}]}
        ),
        Decision(evil, "x", evil, 0, numbers={evil: evil}),
        Decision("setup", "begin", evil, 0, numbers={evil: evil, "versions": {evil: evil}}),
    ]
    (tmp_path / "decisions.jsonl").write_text("".join(encode(d) + "\n" for d in decisions))
    text = page([read_run(tmp_path)])
    assert "<script>alert" not in text
    assert "<img src=x" not in text


@pytest.mark.parametrize("command", ["report", "explain", "replay"])
def test_errors_are_one_line_and_a_status(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("autotune: ")
    assert error.count("\n") == 1


def test_a_port_that_cannot_be_had_is_named(tiny, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["watch", str(tiny.folder), "--port", "80000"])
    assert stop.value.code == 2
    assert "from 0 (any free one) to 65535; got '80000'" in capsys.readouterr().err
    with ReportServer([str(tiny.folder)]) as server:
        port = server.server_address[1]
        assert main(["watch", str(tiny.folder), "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"autotune: port {port} cannot be had (Address already in use)")
    assert error.count("\n") == 1


def test_of_several_runs_those_that_are_there_are_compared(tiny, other_tiny, tmp_path, capsys):
    runs = [str(tiny.folder), str(tmp_path / "nowhere"), str(other_tiny.folder)]
    assert main(["report", *runs, "-o", str(tmp_path / "c.html")]) == 1
    error = capsys.readouterr().err
    assert "nowhere does not exist" in error
    assert "the others are shown without it" in error
    text = (tmp_path / "c.html").read_text()
    assert tiny.folder.name in text
    assert other_tiny.folder.name in text


def test_the_newest_of_several_logs_is_replayed_and_named(tmp_path, capsys):
    for _ in range(2):
        train(tmp_path, [AutoLRS(search_budget=0.5)], max_steps=30)
    assert main(["replay", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "this is the newest" in shown.err
    assert shown.out.startswith("step,lr,batch_size\n0,")


def test_an_unwritable_output_is_named(tiny, capsys):
    assert main(["report", str(tiny.folder), "-o", "/proc/nope/r.html"]) == 1
    assert capsys.readouterr().err == "autotune: /proc/nope/r.html: No such file or directory\n"


def test_report_without_plotly_says_what_to_install(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(tiny.folder), "-o", str(tmp_path / "r.html")]) == 1
    assert "pip install 'lightning-autotune[report]'" in capsys.readouterr().err


def test_explain_tells_every_decision_in_a_pipe(tiny):
    done = run("explain", tiny.folder)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["update", "what", "why", "cost"]
    story = lines[2 : 2 + len(tiny.decisions)]
    for decision, text in zip(tiny.decisions, story, strict=True):
        assert f"{decision.kind}: {decision.action}" in text
        assert decision.reason in text
    assert "\x1b" not in done.stdout


def test_every_kind_has_a_colour_in_both_themes_and_a_style_in_the_terminal():
    sheet = (Path(figures.__file__).parent / "assets" / "report.css").read_text()
    for kind in figures.KINDS:
        assert sheet.count(f"--kind-{kind}:") == 2, kind
    assert set(figures.KINDS) == set(explain._STYLES)


def test_explain_by_kind(tiny, capsys):
    assert main(["explain", str(tiny.folder), "--kind", "batch"]) == 0
    assert "search: set_lr" not in capsys.readouterr().out
    assert main(["explain", str(tiny.folder), "--kind", "nonsense"]) == 0
    assert "No decision of kind nonsense; the log has: batch, finish" in capsys.readouterr().out


def test_replay_exports_csv_and_json(tmp_path, capsys):
    trainer, _ = train(tmp_path, [AutoLRS(search_budget=0.5)], max_steps=60)
    assert main(["replay", trainer.log_dir]) == 0
    shown = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(shown) == 60
    assert main(["replay", trainer.log_dir, "-o", str(tmp_path / "s.csv")]) == 0
    with open(tmp_path / "s.csv", newline="") as file:
        assert list(csv.DictReader(file)) == shown
    assert main(["replay", trainer.log_dir, "-o", str(tmp_path / "s.json")]) == 0
    capsys.readouterr()
    assert main(["replay", trainer.log_dir, "-o", str(tmp_path / "s.txt")]) == 2
    assert "must end in .csv or .json" in capsys.readouterr().err


def test_replay_of_a_log_without_a_schedule(tiny, capsys):
    assert main(["replay", str(tiny.folder)]) == 1
    assert "no setup record of AutoLRS" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path):
    with ReportServer([str(tmp_path / "run")]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return answer.status, answer.read().decode()


def test_watch_serves_loopback_and_follows(server, tiny, tmp_path):
    import json

    assert server.server_address[0] == "127.0.0.1"
    status, text = get(server.url)
    assert status == 200
    assert "Nothing to show yet" in text
    (tmp_path / "run").mkdir()
    lines = (tiny.folder / "decisions.jsonl").read_text().splitlines(keepends=True)
    seen, version = [], ""
    for count in (1, 5, len(lines)):
        (tmp_path / "run" / "decisions.jsonl").write_text("".join(lines[:count]))
        _, text = get(f"{server.url}news?have={urllib.request.quote(version)}")
        news = json.loads(text)
        version = news["version"]
        seen.append(sum(len(trace["x"]) for trace in news["figures"]["r0-timeline"]["data"] if "customdata" in trace))
    assert seen == [1, 5, len(lines)]
    with pytest.raises(urllib.error.HTTPError) as nothing_new:
        get(f"{server.url}news?have={urllib.request.quote(version)}")
    assert nothing_new.value.code == 304
    nothing_new.value.close()


def test_a_browser_may_leave_while_the_page_loads(server, monkeypatch, capsys):
    done, close = threading.Event(), server.shutdown_request
    monkeypatch.setattr(server, "shutdown_request", lambda request: (close(request), done.set()))
    with socket.create_connection(server.server_address) as browser:
        browser.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        browser.recv(100)
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
    assert done.wait(10)
    assert capsys.readouterr().err == ""


def test_watch_refuses_foreign_hosts_and_paths(server):
    for url, headers, code in [
        (server.url, {"Host": "evil.example"}, 403),
        (server.url + "etc/passwd", {}, 404),
    ]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(url, **headers)
        assert refused.value.code == code
        refused.value.close()


def test_a_taken_port_is_told(server, capsys):
    assert main(["watch", "x", "--port", str(server.server_address[1])]) == 1
    assert "Address already in use" in capsys.readouterr().err
