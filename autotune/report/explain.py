"""The run's story in the terminal: one line a decision."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autotune.decision import Decision
from autotune.report.reading import Run
from autotune.report.summary import rows, summarise
from autotune.report.values import spell

#: Colours that hold on dark and light terminals; a pipe gets none.
_STYLES = {
    "search": "blue",
    "forecast": "magenta",
    "stage": "green",
    "rollback": "bold red",
    "plateau": "yellow",
    "setback": "yellow",
    "climb": "blue",
    "batch": "cyan",
    "setup": "dim",
    "finish": "bold",
}


def explain(run: Run, console: Console, kinds: frozenset[str] = frozenset()) -> None:
    """Prints a run.

    Args:
        run: What was read.
        console: Where to.
        kinds: Only decisions of these kinds; empty for all.
    """
    for problem in run.problems:
        console.print(f"[yellow]![/] {escape(problem)}", highlight=False)
    chosen = [decision for decision in run.decisions if not kinds or decision.kind in kinds]
    if chosen:
        console.print(_table(run.name, chosen, console.width))
    elif kinds:
        seen = ", ".join(sorted({decision.kind for decision in run.decisions})) or "none"
        console.print(f"No decision of kind {', '.join(sorted(kinds))}; the log has: {seen}.", highlight=False)
    summary = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    summary.add_column(style="bold", no_wrap=True)
    summary.add_column(justify="right", no_wrap=True)
    summary.add_column(overflow="fold")
    for row in rows(summarise(run)):
        summary.add_row(*(escape(cell) for cell in row))
    console.print(summary)


def _table(title: str, decisions: Sequence[Decision], width: int) -> Table:
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("update", justify="right", no_wrap=True)
    table.add_column("what", no_wrap=True)
    # One line a decision where the terminal is wide enough for it; nothing is cut off where it is not.
    table.add_column("why", overflow="fold", ratio=1 if width < 200 else None)
    table.add_column("cost", justify="right", no_wrap=True)
    for decision in decisions:
        style = _STYLES.get(decision.kind, "")
        when = f"{decision.step:,}"
        if decision.effective_step != decision.step:
            when += f"→{decision.effective_step:,}"
        what = escape(f"{decision.kind}: {decision.action}")
        cost = spell(decision.cost_steps) if decision.cost_steps else ""
        table.add_row(when, f"[{style}]{what}[/]" if style else what, escape(decision.reason), cost)
    return table
