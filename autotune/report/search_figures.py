"""One search opened up: what was tried, what the surrogate made of it, how each trial went."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from autotune.decision import Decision
from autotune.report.figures import LOG_AXIS, Figure
from autotune.report.metrics import Series
from autotune.report.search_data import Candidate, SearchData, search_data
from autotune.report.values import significant, spell

#: Marker by how a trial ended.
STATUS = {"finished": "circle", "stopped": "triangle-down", "diverged": "x"}


def candidates_figure(search: Decision) -> Figure | None:
    """The candidates over their learning rates, the posterior with its 95 % band, the acquisition, the choice."""
    found = search_data(search)
    if found is None:
        return None
    data = _posterior_traces(found)
    statuses = [*STATUS, *sorted({c.status for c in found.candidates} - set(STATUS))]
    for status in statuses:
        group = [c for c in found.candidates if c.status == status]
        if group:
            data.append(_candidate_trace(group, status, found))
    title = "progress left undone" if found.in_progress else "loss"
    layout: dict[str, Any] = {
        "height": 360,
        "xaxis": {**LOG_AXIS, "title": {"text": "learning rate"}, "anchor": "y"},
        "yaxis": {"domain": [0.32, 1.0] if found.acquisition else [0.0, 1.0], "title": {"text": title}},
        "shapes": [] if found.lr is None else [_choice_line(found.lr)],
    }
    if found.acquisition:
        data.append(_acquisition_trace(found))
        layout["yaxis2"] = {"domain": [0.0, 0.2], "title": {"text": "acquis."}, "showticklabels": False}
        layout["xaxis"]["anchor"] = "y2"
    return {"data": data, "layout": layout}


def trials_figure(search: Decision, limit: int) -> Figure | None:
    """The loss of each trial over its own steps.

    Args:
        search: The decision of a search.
        limit: Points that a curve may keep.
    """
    found = search_data(search)
    if found is None or not any(c.curve for c in found.candidates):
        return None
    layout: dict[str, Any] = {"height": 360, "xaxis": {"title": {"text": "trial step"}}}
    layout["yaxis"] = {"title": {"text": "loss"}}
    if found.view is not None:
        layout["yaxis"]["range"] = [significant(edge) for edge in found.view]
    data = [_trial_trace(c, index, limit) for index, c in enumerate(found.candidates) if c.curve]
    return {"data": data, "layout": layout}


def _trial_trace(candidate: Candidate, index: int, limit: int) -> Figure:
    curve = [(step, np.nan if loss is None else loss) for step, loss in candidate.curve]
    small = Series.of(curve).thinned(limit)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": spell(candidate.lr),
        "x": [significant(x) for x in small.steps.tolist()],
        "y": [significant(y) for y in small.values.tolist()],
        "line": {
            "color": f"var(--run-{index % 6})",
            "width": 2,
            "dash": ("solid", "dash", "dot")[index // 6 % 3],
        },
        "hovertemplate": f"{spell(candidate.lr)} ({html.escape(candidate.status)}): %{{y:.4g}}<extra></extra>",
    }


def _posterior_traces(found: SearchData) -> list[Figure]:
    if not found.posterior:
        return []
    xs = [significant(x) for x, _, _ in found.posterior]
    band: Figure = {"type": "scatter", "mode": "lines", "x": xs, "line": {"width": 0}, "hoverinfo": "skip"}
    return [
        {**band, "y": [significant(m - 1.96 * s) for _, m, s in found.posterior], "showlegend": False},
        {
            **band,
            "y": [significant(m + 1.96 * s) for _, m, s in found.posterior],
            "fill": "tonexty",
            "fillcolor": "var(--band)",
            "name": "95 % band",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "posterior mean",
            "x": xs,
            "y": [significant(m) for _, m, _ in found.posterior],
            "line": {"color": "var(--forecast)", "width": 2},
            "hovertemplate": "mean %{y:.3g} at %{x:.3g}<extra></extra>",
        },
    ]


def _acquisition_trace(found: SearchData) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "acquisition",
        "x": [significant(x) for x, _ in found.acquisition],
        "y": [significant(y) for _, y in found.acquisition],
        "yaxis": "y2",
        "line": {"color": "var(--lr)", "width": 1.5},
        "hovertemplate": "acquisition %{y:.3g} at %{x:.3g}<extra></extra>",
    }


def _candidate_trace(group: list[Candidate], status: str, found: SearchData) -> Figure:
    longest = max((c.horizon_steps or 0.0 for c in found.candidates), default=0.0)
    known = status if status in STATUS else "finished"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html.escape(status),
        "x": [significant(c.lr) for c in group],
        "y": [significant(c.height) for c in group],
        "hovertext": [_hover(c) for c in group],
        "hovertemplate": "%{hovertext}<extra></extra>",
        # The shorter trials of an earlier leg are smaller: they weigh less, too.
        "marker": {
            "symbol": STATUS.get(status, "cross"),
            "size": [11 if (c.horizon_steps or 0.0) >= longest else 7 for c in group],
            "color": f"var(--status-{known})",
        },
    }


def _hover(candidate: Candidate) -> str:
    steps = f"{spell(candidate.steps)} of {spell(candidate.horizon_steps)} steps"
    lines = [
        f"learning rate {spell(candidate.lr)}",
        f"loss {spell(candidate.loss, 5)}",
        f"{candidate.status} after {steps}",
    ]
    lines += [candidate.reason] if candidate.reason else []
    return "<br>".join(html.escape(line) for line in lines)


def _choice_line(lr: float) -> Figure:
    line = {"color": "var(--lr)", "width": 2, "dash": "dash"}
    return {"type": "line", "x0": lr, "x1": lr, "y0": 0, "y1": 1, "yref": "paper", "line": line}
