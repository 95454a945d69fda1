"""One self-contained HTML file: every script, style and number is inside, nothing is fetched.

What a reader needs is in the HTML itself (figures of cost, tables, reasons), so that it can be read without a
script, searched, printed, and heard; the interactive figures come on top.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from autotune.decision import Decision
from autotune.errors import UnsupportedSetupError
from autotune.report.figures import KINDS, Figure, budget_of_curve, comparison, timeline
from autotune.report.reading import Run, distinct
from autotune.report.search_figures import candidates_figure, trials_figure
from autotune.report.summary import rows, saved_steps, summarise
from autotune.report.values import mapping, number, records, settings, spell, spell_seconds

Figures = dict[str, Figure]


def page(runs: Sequence[Run], live: bool = False) -> str:
    """The whole report.

    Args:
        runs: One run, or several to compare.
        live: The page asks its server for news (``autotune watch``).

    Raises:
        UnsupportedSetupError: The plotting library is not installed.
    """
    body, figures = content(runs)
    assets = resources.files("autotune.report") / "assets"
    title = "Autotune: " + ", ".join(run.name for run in runs)
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"{" data-live" if live else ""}>',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{(assets / 'report.css').read_text(encoding='utf-8')}</style></head>",
            f'<body><main id="content">{body}</main>',
            # Each figure is parsed when it is drawn: most belong to searches that nobody has opened yet.
            *(
                f'<script type="application/json" id="json-{key}">{script_json(figures[key])}</script>'
                for key in figures
            ),
            f"<script>{_plotly()}</script>",
            f"<script>{(assets / 'report.js').read_text(encoding='utf-8')}</script>",
            "</body></html>\n",
        ]
    )


def content(runs: Sequence[Run]) -> tuple[str, Figures]:
    """The page's body and the figures that it names."""
    figures: Figures = {}
    runs = distinct(runs) if len(runs) > 1 else runs
    curves = sum(len(records(d, "candidates")) for run in runs for d in run.decisions if d.kind == "search")
    limit = budget_of_curve(curves)
    head = (
        '<header><h1>Autotune report</h1><p class="name">'
        + escape(" · ".join(run.name for run in runs))
        + '</p><button type="button" id="theme">Dark or light</button>'
        + '<p id="live" role="status" hidden></p></header>'
    )
    if len(runs) == 1:
        return head + _run_section(runs[0], 0, limit, figures), figures
    figures["comparison"] = comparison(runs)
    parts = [head, "<section><h2>Runs compared</h2>", _axis_free_figure("comparison", "Losses over updates")]
    parts += [_comparison_table(runs), "</section>"]
    for index, run in enumerate(runs):
        inside = _run_section(run, index, limit, figures)
        parts.append(f'<details class="run"><summary>{escape(run.name)}</summary>{inside}</details>')
    return "".join(parts), figures


def script_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UnsupportedSetupError(
            "the report draws with plotly, which is not installed: pip install 'lightning-autotune[report]'. "
            "`autotune explain` tells the same story in the terminal without it."
        ) from error
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _run_section(run: Run, index: int, limit: int, figures: Figures) -> str:
    key = f"r{index}"
    parts = []
    if run.problems:
        items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
        parts.append(f'<section class="problems"><h2>What could not be read</h2><ul>{items}</ul></section>')
    cards = "".join(
        f"<div><dt>{escape(what)}</dt><dd><b>{escape(value)}</b><span>{escape(meaning)}</span></dd></div>"
        for what, value, meaning in rows(summarise(run))
    )
    parts.append(f'<section><h2>What it came to</h2><dl class="cards">{cards}</dl></section>')
    figures[f"{key}-timeline"] = figure = timeline(run)
    if figure["data"]:
        parts.append(f"<section><h2>The run</h2>{_axis_choice(key, figure)}")
        parts.append(_axis_free_figure(f"{key}-timeline", "Decisions, loss, learning rate and batch over the run"))
        parts.append(
            '<p class="hint">Point at a marker for its reason. With the keyboard: focus the figure, '
            "then ← and → go from decision to decision, Enter jumps to its row.</p></section>"
        )
    parts.append(_searches(run, key, limit, figures))
    parts.append(_table(run, key))
    parts.append(_configuration(run))
    return "".join(parts)


def _axis_choice(key: str, figure: Figure) -> str:
    if not figure.get("examples"):
        return ""
    radios = "".join(
        f'<label><input type="radio" name="{key}-axis" value="{axis}" data-axis="{key}-timeline"'
        f"{' checked' if axis == 'updates' else ''}> {axis}</label>"
        for axis in ("updates", "examples")
    )
    return f'<fieldset class="axis"><legend>Axis</legend>{radios}</fieldset>'


def _axis_free_figure(key: str, label: str) -> str:
    return f'<div class="figure" tabindex="0" role="group" aria-label="{escape(label)}" data-figure="{key}"></div>'


def _searches(run: Run, key: str, limit: int, figures: Figures) -> str:
    # A search that was due and not made has its line among the decisions, and nothing to open.
    made = [d.kind == "search" and d.action != "skip" for d in run.decisions]
    searches = [(index, d) for index, d in enumerate(run.decisions) if made[index]]
    if not searches:
        return ""
    parts = ["<section><h2>Searches</h2>"]
    for nth, (index, search) in enumerate(searches, start=1):
        parts.append(f'<details id="{key}-s{index}"><summary>{escape(_search_title(nth, search))}</summary>')
        parts.append(f"<p>{escape(search.reason)}</p>")
        drawn = {
            f"{key}-s{index}-c": (candidates_figure(search), "Candidates, posterior and choice"),
            f"{key}-s{index}-t": (trials_figure(search, limit), "Loss of each trial over its steps"),
        }
        parts.append('<div class="pair">')
        for name, (figure, label) in drawn.items():
            if figure is not None:
                figures[name] = figure
                parts.append(_axis_free_figure(name, label))
        parts.append("</div>")
        parts.append(_candidate_table(search))
        parts.append("</details>")
    return "".join([*parts, "</section>"])


def _search_title(nth: int, search: Decision) -> str:
    count = len(records(search, "candidates"))
    lr = number(search, "lr")
    outcome = {"set_lr": f"learning rate {spell(lr)}", "keep_lr": f"kept {spell(lr)}"}.get(search.action, search.action)
    cost = f"{spell(search.cost_steps)} steps"
    seconds = number(search, "seconds")
    time = f", {spell_seconds(seconds)}" if seconds is not None else ""
    return f"Search {nth} at update {search.step:,}: {outcome}; {count} candidates, {cost}{time}"


def _candidate_table(search: Decision) -> str:
    candidates = records(search, "candidates")
    if not candidates:
        return ""
    body = "".join(
        f"<tr><td>{escape(spell(c.get('lr')))}</td><td>{escape(spell(c.get('loss'), 5))}</td>"
        f"<td>{escape(spell(c.get('steps')))} of {escape(spell(c.get('horizon_steps')))}</td>"
        f"<td>{escape(spell(c.get('status')))}</td><td>{escape(spell(c.get('reason') or ''))}</td></tr>"
        for c in candidates
    )
    saved = f" Early stops saved {spell(saved_steps(search))} steps." if saved_steps(search) else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Candidates"><table><caption>Candidates.{saved}'
        "</caption><thead><tr><th>Learning rate</th><th>Loss</th><th>Steps</th><th>How it ended</th>"
        f"<th>Why</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _table(run: Run, key: str) -> str:
    if not run.decisions:
        return ""
    kinds = sorted({d.kind for d in run.decisions}, key=lambda kind: ([*KINDS, kind].index(kind), kind))
    boxes = "".join(
        f'<label><input type="checkbox" checked data-kind="{escape(kind)}" data-table="{key}"> {escape(kind)}</label>'
        for kind in kinds
    )
    body = "".join(_row(decision, index, key) for index, decision in enumerate(run.decisions))
    return (
        f'<section><h2>Decisions</h2><fieldset class="filter"><legend>Show</legend>{boxes}</fieldset>'
        f'<label class="find">Find <input type="search" data-find="{key}"></label>'
        f'<div class="scroll tall" tabindex="0" role="region" aria-label="Decisions"><table id="{key}-table">'
        "<thead><tr><th>Update</th><th>In effect</th><th>What</th><th>Why</th><th>Cost (steps)</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _row(decision: Decision, index: int, key: str) -> str:
    return (
        f'<tr id="{key}-d{index}" data-kind="{escape(decision.kind)}" tabindex="-1">'
        f'<td><button type="button" class="step" data-show="{key}-timeline" data-index="{index}" '
        f'aria-label="Show update {decision.step} in the figure">{decision.step:,}</button></td>'
        f"<td>{decision.effective_step:,}</td><td>{escape(decision.kind)}: {escape(decision.action)}</td>"
        f"<td>{escape(decision.reason)}</td><td>{spell(decision.cost_steps) if decision.cost_steps else ''}</td></tr>"
    )


def _configuration(run: Run) -> str:
    found = settings(run.decisions)
    if not found:
        return ""
    nested: dict[str, Any] = {name: mapping(found, name) for name in found if mapping(found, name)}
    tables = {"Configuration": {name: value for name, value in found.items() if not isinstance(value, Mapping)}}
    tables.update({name.replace("_", " ").capitalize(): value for name, value in nested.items()})
    said = "".join(f"<p>{escape(d.reason)}</p>" for d in run.decisions if d.kind == "setup")
    parts = [f"<section><h2>Configuration and versions</h2>{said}<div class='pair'>"]
    for title, entries in tables.items():
        body = "".join(
            f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(spell(value, 6))}</td></tr>'
            for name, value in entries.items()
        )
        parts.append(
            f'<div class="scroll"><table><caption>{escape(title)}</caption><tbody>{body}</tbody></table></div>'
        )
    return "".join([*parts, "</div></section>"])


def _comparison_table(runs: Sequence[Run]) -> str:
    columns = [rows(summarise(run)) for run in runs]
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(cells[0][0])}</th>' + "".join(f"<td>{escape(c[1])}</td>" for c in cells) + "</tr>"
        for cells in zip(*columns, strict=True)
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Comparison"><table><caption>What they came to'
        f"</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}{_differences(runs)}</tbody></table></div>"
    )


def _differences(runs: Sequence[Run]) -> str:
    found = [settings(run.decisions) for run in runs]
    names = sorted({name for setup in found for name in setup})
    body = ""
    for name in names:
        cells = [spell(setup.get(name), 6) for setup in found]
        if len(set(cells)) > 1:
            row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            body += f'<tr><th scope="row">{escape(name)} (setting)</th>{row}</tr>'
    return body
