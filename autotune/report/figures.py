"""Figures as plain Plotly dictionaries: data here, drawing in the browser.

Colours are written as ``var(--name)``: the page's script puts in the value that the style sheet has for the
reader's theme, so that one figure serves light and dark.
"""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from autotune.decision import Decision
from autotune.report.metrics import Series
from autotune.report.reading import Run
from autotune.report.tracks import batch_size, examples_axis, forecasts, learning_rate, losses, noise_scale
from autotune.report.values import significant, spell

Figure: TypeAlias = "dict[str, Any]"

#: A curve keeps at most so many points: about two a pixel.
CURVE_POINTS = 2000

#: Marker shapes by kind, so that colour is not the only difference. The order is the order of the lanes.
KINDS = {
    "setup": "circle-open",
    "search": "diamond",
    "forecast": "circle",
    "stage": "square",
    "rollback": "triangle-left",
    "plateau": "triangle-down",
    "setback": "triangle-down",
    "climb": "cross-thin-open",
    "batch": "triangle-up",
    "finish": "star",
}
OTHER = "cross"

#: Every tick is spelled out: a bare "2" between two powers of ten is easily misread.
LOG_AXIS: dict[str, Any] = {"type": "log", "tickformat": "~g", "nticks": 6}


def timeline(run: Run) -> Figure:
    """The run on one step axis: decisions, losses with forecasts, learning rate, batch with noise scale."""
    panels: list[tuple[str, float, list[Figure], dict[str, Any]]] = [
        ("Decisions", 0.26, _decision_traces(run), _lanes(run)),
        ("Loss", 0.34, _loss_traces(run), {}),
        ("Learning rate", 0.2, _lr_traces(run), _rate_axis([run])),
        ("Batch (examples)", 0.2, _batch_traces(run), _batch_axis([run])),
    ]
    figure = _stacked([panel for panel in panels if panel[2]])
    axis = examples_axis(run)
    figure["examples"] = None if axis is None else [[significant(x, 9) for x in knot] for knot in axis]
    return figure


def comparison(runs: Sequence[Run]) -> Figure:
    """Several runs over each other: loss, learning rate, batch."""
    panels: list[tuple[str, Callable[[Run], Series | None], dict[str, Any]]] = [
        ("Loss", _main_loss, {}),
        ("Learning rate", learning_rate, _rate_axis(runs)),
        ("Batch (examples)", batch_size, _batch_axis(runs)),
    ]
    drawn = []
    for title, track, axis in panels:
        traces = []
        for index, run in enumerate(runs):
            series = track(run)
            if series is not None and len(series.steps):
                style = {"color": f"var(--run-{index % 6})", "dash": ("solid", "dash", "dot")[index // 6 % 3]}
                trace = _line(series, run.name, style, shape="hv" if track is batch_size else "linear")
                traces.append({**trace, "legendgroup": run.name, "showlegend": title == "Loss"})
        drawn.append((title, 1.0, traces, axis))
    return _stacked([panel for panel in drawn if panel[2]])


def hover(decision: Decision) -> str:
    """What a marker says: when, what, why, at what cost. Log text is escaped; the figure knows some tags."""
    lines = [f"<b>{html.escape(decision.kind)}: {html.escape(decision.action)}</b> at update {decision.step:,}"]
    lines += [html.escape(line) for line in textwrap.wrap(decision.reason, 46)]
    if decision.effective_step != decision.step:
        lines.append(f"in effect from update {decision.effective_step:,}")
    if decision.cost_steps:
        lines.append(f"cost {spell(decision.cost_steps)} steps")
    return "<br>".join(lines)


def _decision_traces(run: Run) -> list[Figure]:
    lanes = {kind: lane for lane, kind in enumerate(_kinds(run))}
    crowd = Counter((decision.kind, decision.step) for decision in run.decisions)
    placed = Counter[tuple[str, int]]()
    by_kind: dict[str, Figure] = {}
    for index, decision in enumerate(run.decisions):
        kind = decision.kind
        trace = by_kind.setdefault(
            kind,
            {
                "type": "scatter",
                "mode": "markers",
                "name": kind,
                "uid": f"kind-{kind}",
                "showlegend": False,
                "x": [],
                "y": [],
                "hovertext": [],
                "customdata": [],
                "hovertemplate": "%{hovertext}<extra></extra>",
                "marker": {
                    "symbol": KINDS.get(kind, OTHER),
                    "size": 10,
                    "color": f"var(--kind-{kind if kind in KINDS else 'other'})",
                    "line": {"width": 1, "color": "var(--page)"},
                },
            },
        )
        # Two decisions of one kind at one step stand beside each other, or one would hide the other.
        here = (kind, decision.step)
        trace["x"].append(decision.step)
        trace["y"].append(
            -lanes[kind] + 0.25 - 0.5 * (placed[here] + 0.5 * (crowd[here] == 1)) / max(crowd[here] - 1, 1)
        )
        placed[here] += 1
        trace["hovertext"].append(hover(decision))
        trace["customdata"].append(index)
    return list(by_kind.values())


def _lanes(run: Run) -> dict[str, Any]:
    kinds = _kinds(run)
    return {
        "tickmode": "array",
        "tickvals": [-lane for lane in range(len(kinds))],
        "ticktext": [html.escape(kind) for kind in kinds],
        "range": [0.6 - len(kinds), 0.6],
        "fixedrange": True,
        "zeroline": False,
    }


def _kinds(run: Run) -> list[str]:
    seen = {decision.kind for decision in run.decisions}
    return [kind for kind in KINDS if kind in seen] + sorted(seen - set(KINDS))


def _loss_traces(run: Run) -> list[Figure]:
    curves = losses(run)
    traces = []
    if "train" in curves:
        name, series = curves["train"]
        traces.append(_line(series, name, {"color": "var(--train)", "width": 1}))
    if "validation" in curves:
        name, series = curves["validation"]
        traces.append({**_line(series, name, {"color": "var(--validation)"}), "mode": "lines+markers"})
    made = forecasts(run)
    if made:
        up = [significant(None if f.high is None else f.high - f.prediction) or 0 for f in made]
        down = [significant(None if f.low is None else f.prediction - f.low) or 0 for f in made]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "forecast",
                "uid": "forecast",
                # A stage ends where its work is done, which is earlier than foreseen when the batch grows; what was
                # foreseen for its end stands beside what came there.
                "x": [f.target_step if f.came_at is None else f.came_at for f in made],
                "y": [significant(f.prediction) for f in made],
                "marker": {"symbol": "circle-open", "size": 8, "color": "var(--forecast)"},
                "error_y": {"type": "data", "array": up, "arrayminus": down, "color": "var(--forecast)"},
                "hovertext": [f"made at update {f.made_at:,} for {f.target_step:,.0f}" for f in made],
                "hovertemplate": "forecast %{y:.4g}, %{hovertext}<extra></extra>",
            }
        )
        true = [f for f in made if f.outcome is not None]
        if true:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": "what came",
                    "uid": "outcome",
                    "x": [f.came_at for f in true],
                    "y": [significant(f.outcome) for f in true],
                    "marker": {"symbol": "x", "size": 8, "color": "var(--validation)"},
                    "hovertext": [_verdict(f.inside) for f in true],
                    "hovertemplate": "came %{y:.4g}, %{hovertext}<extra></extra>",
                }
            )
    return traces


def _verdict(inside: bool | None) -> str:
    return "no interval was given" if inside is None else "inside the interval" if inside else "outside the interval"


def _lr_traces(run: Run) -> list[Figure]:
    series = learning_rate(run)
    return [] if series is None else [_line(series, "learning rate", {"color": "var(--lr)"})]


def _batch_traces(run: Run) -> list[Figure]:
    traces = []
    size, noise = batch_size(run), noise_scale(run)
    if size is not None:
        traces.append(_line(size, "batch", {"color": "var(--batch)"}, shape="hv"))
    if noise is not None:
        traces.append(_line(noise, "noise scale", {"color": "var(--noise)", "width": 1, "dash": "dot"}))
    return traces


def _rate_axis(runs: Sequence[Run]) -> dict[str, Any]:
    """A logarithmic axis: powers of ten over many decades, where steps of 1, 2 and 5 would stand on each other."""
    drawn = [series.values for run in runs if (series := learning_rate(run)) is not None]
    values = np.concatenate(drawn) if drawn else np.empty(0)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() / values.min() > 50:
        return {**LOG_AXIS, "dtick": max(1, round(np.log10(values.max() / values.min()) / 4))}
    return LOG_AXIS


def _batch_axis(runs: Sequence[Run]) -> dict[str, Any]:
    """A logarithmic axis with ticks at powers of two, six at most: the numbers that batches have."""
    drawn = [series for run in runs for series in (batch_size(run), noise_scale(run)) if series is not None]
    values = np.concatenate([series.values for series in drawn]) if drawn else np.empty(0)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return {"type": "log"}
    low, high = int(np.floor(np.log2(values.min()))), int(np.ceil(np.log2(values.max())))
    ticks = [2.0**power for power in range(low, high + 1, max((high - low) // 5, 1))]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [spell(tick) for tick in ticks]}


def _main_loss(run: Run) -> Series | None:
    curves = losses(run)
    curve = curves.get("validation") or curves.get("train")
    return None if curve is None else curve[1]


def _line(series: Series, name: str, line: dict[str, Any], shape: str = "linear") -> Figure:
    small = series.thinned(CURVE_POINTS)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": html.escape(name),
        "uid": f"line-{name}",
        "x": [significant(x, 9) for x in small.steps.tolist()],
        "y": [significant(y) for y in small.values.tolist()],
        "line": {"width": 2, **line, "shape": shape},
        "hovertemplate": f"{html.escape(name)} %{{y:.4g}}<extra></extra>",
    }


def _stacked(panels: list[tuple[str, float, list[Figure], dict[str, Any]]]) -> Figure:
    """Panels under each other on one x axis; each is (title, relative height, traces, y axis)."""
    gap = 0.06
    total = sum(panel[1] for panel in panels) or 1.0
    room = 1.0 - gap * (len(panels) - 1)
    data: list[Figure] = []
    layout: dict[str, Any] = {"height": 120 + 170 * len(panels), "annotations": []}
    top = 1.0
    for index, (title, height, traces, axis) in enumerate(panels):
        bottom = top - room * height / total
        suffix = "" if index == 0 else str(index + 1)
        layout[f"yaxis{suffix}"] = {"domain": [max(bottom, 0.0), top], "anchor": "x", **axis}
        layout["annotations"].append(
            {
                "text": title,
                "x": 0,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 13},
            }
        )
        data += [{**trace, "xaxis": "x", "yaxis": f"y{suffix}"} for trace in traces]
        top = bottom - gap
    layout["xaxis"] = {"anchor": f"y{len(panels) if len(panels) > 1 else ''}", "title": {"text": "updates"}}
    return {"data": data, "layout": layout}


def budget_of_curve(count: int) -> int:
    """Points a trial curve may keep when the page holds ``count`` of them: the file has to stay small.

    >>> budget_of_curve(7), budget_of_curve(2000)
    (400, 20)
    """
    return min(max(40_000 // max(count, 1), 20), 400)
