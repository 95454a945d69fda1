"""One search opened up: what was tried, what the surrogate made of it, how each trial went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autotune.decision import Decision
from autotune.report.figures import LOG_AXIS, Figure
from autotune.report.metrics import Series
from autotune.report.values import column, mapping, number, pairs, records, significant, spell

#: Marker by how a trial ended.
STATUS = {"finished": "circle", "stopped": "triangle-down", "diverged": "x"}


def candidates_figure(search: Decision) -> Figure | None:
    """Loss over learning rate: the candidates, the posterior with its 95 % band, the acquisition, the choice."""
    tried = [c for c in records(search, "candidates") if number(c, "lr") is not None]
    posterior = mapping(search, "posterior")
    if not tried and not posterior:
        return None
    data = _posterior_traces(posterior)
    acquisition = _acquisition_trace(posterior)
    for status, symbol in STATUS.items():
        group = [c for c in tried if c.get("status", "finished") == status]
        if group:
            data.append(_candidate_trace(group, status, symbol, ceiling(tried, search)))
    layout: dict[str, Any] = {
        "height": 340,
        "xaxis": {**LOG_AXIS, "title": {"text": "learning rate"}, "anchor": "y"},
        "yaxis": {"domain": [0.3, 1.0] if acquisition else [0.0, 1.0], "title": {"text": "loss"}},
        "shapes": [_choice_line(lr)] if (lr := number(search, "lr")) else [],
    }
    if acquisition:
        data.append(acquisition)
        layout["yaxis2"] = {"domain": [0.0, 0.2], "title": {"text": "acquisition"}, "showticklabels": False}
        layout["xaxis"]["anchor"] = "y2"
    return {"data": data, "layout": layout}


def trials_figure(search: Decision, limit: int) -> Figure | None:
    """The loss of each trial over its own steps.

    Args:
        search: The decision of a search.
        limit: Points that a curve may keep.
    """
    data = []
    for index, candidate in enumerate(records(search, "candidates")):
        curve = [(step, np.nan if y is None else y) for step, y in pairs(candidate, "curve")]
        if not curve:
            continue
        small = Series.of(curve).thinned(limit)
        lr, status = number(candidate, "lr"), str(candidate.get("status", "finished"))
        chosen = lr is not None and lr == number(search, "lr")
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{spell(lr)}{' (chosen)' if chosen else ''}",
                "x": [significant(x) for x in small.steps.tolist()],
                "y": [significant(y) for y in small.values.tolist()],
                "line": {
                    "color": f"var(--run-{index % 6})",
                    "width": 3 if chosen else 1.5,
                    "dash": "solid" if status == "finished" else "dot",
                },
                "hovertemplate": f"{spell(lr)} ({status}): %{{y:.4g}}<extra></extra>",
            }
        )
    if not data:
        return None
    layout: dict[str, Any] = {"height": 340, "xaxis": {"title": {"text": "trial step"}}}
    layout["yaxis"] = {"title": {"text": "loss"}}
    if (view := _view(search)) is not None:
        layout["yaxis"]["range"] = view
    return {"data": data, "layout": layout}


def _view(search: Decision) -> list[float] | None:
    """A range of losses in which the trials that did not explode can be told apart; the reader can zoom out."""
    sane = [c for c in records(search, "candidates") if c.get("status") != "diverged"]
    values = [y for c in sane for _, y in pairs(c, "curve") if y is not None]
    if not values or len(sane) == len(records(search, "candidates")):
        return None
    margin = 0.05 * (max(values) - min(values)) or 0.1 * abs(max(values)) or 1.0
    return [min(values) - margin, max(values) + margin]


def _posterior_traces(posterior: Mapping[str, Any]) -> list[Figure]:
    lr, mean, sd = (column(posterior, key) for key in ("lr", "mean", "sd"))
    whole = [
        (x, m, s)
        for x, m, s in zip(lr, mean, sd or [0.0] * len(lr), strict=False)
        if x is not None and m is not None and s is not None
    ]
    if not whole:
        return []
    xs = [significant(x) for x, _, _ in whole]
    band: Figure = {"type": "scatter", "mode": "lines", "x": xs, "line": {"width": 0}, "hoverinfo": "skip"}
    low = [significant(m - 1.96 * s) for _, m, s in whole]
    high = [significant(m + 1.96 * s) for _, m, s in whole]
    return [
        {**band, "y": low, "showlegend": False},
        {**band, "y": high, "fill": "tonexty", "fillcolor": "var(--band)", "name": "95 % band"},
        {
            "type": "scatter",
            "mode": "lines",
            "name": "posterior mean",
            "x": xs,
            "y": [significant(m) for _, m, _ in whole],
            "line": {"color": "var(--forecast)", "width": 2},
            "hovertemplate": "mean %{y:.4g} at %{x:.3g}<extra></extra>",
        },
    ]


def _acquisition_trace(posterior: Mapping[str, Any]) -> Figure | None:
    lr, value = column(posterior, "lr"), column(posterior, "acquisition")
    whole = [(x, y) for x, y in zip(lr, value, strict=False) if x is not None and y is not None]
    if not whole:
        return None
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "acquisition",
        "x": [significant(x) for x, _ in whole],
        "y": [significant(y) for _, y in whole],
        "yaxis": "y2",
        "line": {"color": "var(--lr)", "width": 1.5},
        "hovertemplate": "acquisition %{y:.3g} at %{x:.3g}<extra></extra>",
    }


def ceiling(tried: list[Mapping[str, Any]], search: Decision) -> float:
    """Where to draw a loss that is not finite or that would flatten all the others."""
    found = [y for c in tried if (y := number(c, "loss")) is not None]
    if not found:
        return number(search, "initial_loss") or 1.0
    start = number(search, "initial_loss")
    best = min(found)
    usual = max([y for y in found if start is None or y <= 2 * abs(start)] or [best])
    return usual + 0.1 * abs(usual - best) if usual > best else usual + 0.1 * abs(usual)


def _candidate_trace(group: list[Mapping[str, Any]], status: str, symbol: str, top: float) -> Figure:
    ys, texts = [], []
    for candidate in group:
        loss = number(candidate, "loss")
        ys.append(significant(top if loss is None else min(loss, top)))
        parts = [f"learning rate {spell(number(candidate, 'lr'))}", f"loss {spell(loss, 5)}"]
        parts.append(f"{status} after {spell(number(candidate, 'steps'))} steps")
        if candidate.get("reason"):
            parts.append(str(candidate["reason"]).replace("&", "&amp;").replace("<", "&lt;"))
        texts.append("<br>".join(parts))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": status,
        "x": [significant(number(candidate, "lr")) for candidate in group],
        "y": ys,
        "hovertext": texts,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"symbol": symbol, "size": 11, "color": f"var(--status-{status})"},
    }


def _choice_line(lr: float) -> Figure:
    return {
        "type": "line",
        "x0": lr,
        "x1": lr,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": "var(--lr)", "width": 2, "dash": "dash"},
    }
