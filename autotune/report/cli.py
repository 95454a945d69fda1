"""The ``autotune`` command: report, watch, explain, replay."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from autotune import __version__
from autotune.errors import AutotuneError, ConfigurationError

_RUN_HELP = (
    "a run's directory (the one that holds decisions.jsonl), a directory of runs (the newest is taken), or a log"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0, 1 when something cannot be read or written, 2 for a wrong command line.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except AutotuneError as error:
        print(f"autotune: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `autotune explain … | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"autotune: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autotune",
        description="Look at, follow and replay what lightning-autotune decided in a run.",
        epilog="Every run that has a controller writes decisions.jsonl into its log directory.",
    )
    parser.add_argument("--version", action="version", version=f"lightning-autotune {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_report(commands)
    _add_watch(commands)
    _add_explain(commands)
    _add_replay(commands)
    return parser


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="write one HTML file that shows a run, or compares several",
        description="Writes one HTML file that needs no network: curves, decisions, searches, costs.",
        epilog="example: autotune report lightning_logs/version_3 --open",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help=_RUN_HELP + "; several are compared")
    where = "default: report.html in the run, of several comparison.html here"
    report.add_argument("-o", "--output", type=Path, help=f"the file to write ({where})")
    report.add_argument("--open", action="store_true", help="open it in the browser")
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from autotune.report.page import page
    from autotune.report.reading import read_run

    runs, missing = [], []
    for path in arguments.runs:
        try:
            runs.append(read_run(path))
        except AutotuneError as error:
            missing.append(error)
    if not runs:
        raise missing[0]
    for refused in missing:
        print(f"autotune: {refused}; the others are shown without it", file=sys.stderr)
    for run in runs:
        for problem in run.problems:
            print(f"note: {problem}", file=sys.stderr)
    default = Path("comparison.html") if len(runs) > 1 else runs[0].path.parent / "report.html"
    output: Path = arguments.output or default
    if output.is_dir():
        output = output / default.name
    output.write_text(page(runs), encoding="utf-8")
    print(output)
    if arguments.open and not webbrowser.open(output.resolve().as_uri()):
        print("note: no browser could be opened here; open the file by hand", file=sys.stderr)
    return 1 if missing else 0


def _add_watch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    watch = commands.add_parser(
        "watch",
        help="serve the report on this machine and follow a run while it trains",
        description="Serves the report on 127.0.0.1, to this machine only, and follows the run. Ctrl-C ends it.",
        epilog="From a cluster: ssh -L 8787:127.0.0.1:8787 NODE, then autotune watch RUN --port 8787 there.",
    )
    watch.add_argument("runs", nargs="+", metavar="RUN", help=_RUN_HELP + "; it need not hold anything yet")
    watch.add_argument("--port", type=_port, default=0, help="the port (default: a free one)")
    watch.add_argument("--open", action="store_true", help="open it in the browser")
    watch.set_defaults(command=_watch)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 (any free one) to 65535; got {text!r}")
    return int(text)


def _watch(arguments: argparse.Namespace) -> int:
    from autotune.report.watch import ReportServer

    try:
        server = ReportServer(arguments.runs, arguments.port)
    except OSError as error:
        raise ConfigurationError(
            f"port {arguments.port} cannot be had ({error.strerror}): name another, or leave --port out for a free one"
        ) from error
    with server:
        server.first_page()
        print(f"following {', '.join(arguments.runs)} at {server.url} (Ctrl-C ends)", flush=True)
        if arguments.open:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    explain = commands.add_parser(
        "explain",
        help="tell a run's story in the terminal, decision by decision",
        description="Tells a run's story in the terminal, decision by decision, and what it cost.",
        epilog="example: autotune explain lightning_logs/version_3 --kind search --kind rollback",
    )
    explain.add_argument("run", metavar="RUN", help=_RUN_HELP)
    explain.add_argument("--kind", action="append", default=[], help="only decisions of this kind; may be repeated")
    explain.set_defaults(command=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from autotune.report.explain import explain
    from autotune.report.reading import read_run

    explain(read_run(arguments.run), Console(), frozenset(arguments.kind))
    return 0


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    replay = commands.add_parser(
        "replay",
        help="export the schedule that a run found",
        description="Writes the learning rate (the peak of your own scheduler, a multiplier where only the batch was "
        "controlled) and batch of every update of a run as CSV or JSON. To train with it, "
        "use autotune.callbacks.ReplaySchedule(path) or autotune.replay.load_schedule(path).lambda_lr(optimizer).",
        epilog="example: autotune replay lightning_logs/version_3 -o schedule.csv",
    )
    replay.add_argument("run", metavar="RUN", help=_RUN_HELP)
    replay.add_argument("-o", "--output", type=Path, help="a .csv or .json file (default: CSV to the terminal)")
    replay.set_defaults(command=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from autotune.replay import load_schedule
    from autotune.report.reading import find_log

    log, told = find_log(arguments.run)
    for note in told if log.is_file() else ():
        print(f"note: {note}", file=sys.stderr)
    schedule = load_schedule(log)
    if arguments.output is None:
        schedule.write_csv(sys.stdout)
        return 0
    if arguments.output.suffix not in (".csv", ".json"):
        print(f"autotune: {arguments.output}: the name must end in .csv or .json", file=sys.stderr)
        return 2
    with open(arguments.output, "w", newline="", encoding="utf-8") as file:
        (schedule.write_json if arguments.output.suffix == ".json" else schedule.write_csv)(file)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
