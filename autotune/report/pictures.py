"""Still pictures of a search for dashboards that show images. The only file that imports matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autotune.decision import Decision
from autotune.report.search_figures import ceiling
from autotune.report.values import column, mapping, number, pairs, records, spell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"finished": ("o", "tab:blue"), "stopped": ("v", "tab:orange"), "diverged": ("x", "tab:red")}


def search_picture(search: Decision) -> Figure | None:
    """Candidates, posterior and choice on the left, the trials' losses on the right.

    Returns:
        None where the search has nothing to draw, or matplotlib is not installed: a dashboard then goes without
        the picture rather than the training without its dashboard.
    """
    candidates = [c for c in records(search, "candidates") if number(c, "lr") is not None]
    if not candidates:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # Not pyplot: it keeps every figure alive and may open a window.
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_candidates(left, search, candidates)
    _draw_trials(right, search, candidates)
    figure.suptitle(f"update {search.step:,}: {search.action} {spell(number(search, 'lr'))}", fontsize=11)
    return figure


def pixels(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The picture as an RGB array, shape (height, width, 3)."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()


def _draw_candidates(axes: Axes, search: Decision, candidates: list[Any]) -> None:
    top = ceiling(candidates, search)
    for status, (marker, colour) in _MARKERS.items():
        group = [c for c in candidates if c.get("status", "finished") == status]
        ys = [top if (loss := number(c, "loss")) is None else min(loss, top) for c in group]
        if group:
            axes.scatter([float(c["lr"]) for c in group], ys, marker=marker, color=colour, label=status, zorder=3)
    posterior = mapping(search, "posterior")
    whole = [
        item
        for item in zip(*(column(posterior, key) for key in ("lr", "mean", "sd")), strict=False)
        if None not in item
    ]
    if whole:
        lr, mean, sd = np.asarray(whole, dtype=np.float64).T
        axes.plot(lr, mean, color="tab:purple", label="posterior mean")
        axes.fill_between(lr, mean - 1.96 * sd, mean + 1.96 * sd, color="tab:purple", alpha=0.15, label="95 % band")
    chosen = number(search, "lr")
    if chosen is not None and chosen > 0:
        axes.axvline(chosen, color="tab:green", linestyle="--", label="in use after it")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss at the trial's end")
    axes.legend(fontsize=7)


def _draw_trials(axes: Axes, search: Decision, candidates: list[Any]) -> None:
    for candidate in candidates:
        curve = [(step, np.nan if loss is None else loss) for step, loss in pairs(candidate, "curve")]
        if curve:
            steps, values = np.asarray(curve, dtype=np.float64).T
            width = 2.5 if number(candidate, "lr") == number(search, "lr") else 1.0
            axes.plot(steps, values, linewidth=width, label=spell(number(candidate, "lr")))
    sane = [y for c in candidates if c.get("status") != "diverged" for _, y in pairs(c, "curve") if y is not None]
    if sane and max(sane) > min(sane):
        margin = 0.05 * (max(sane) - min(sane))
        axes.set_ylim(min(sane) - margin, max(sane) + margin)
    axes.set(xlabel="trial step", ylabel="loss")
    if axes.lines:
        axes.legend(fontsize=7, title="learning rate", title_fontsize=7)
