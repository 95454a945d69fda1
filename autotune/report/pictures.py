"""Still pictures of a search for dashboards that show images. The only file that imports matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autotune.decision import Decision
from autotune.report.search_data import SearchData, search_data
from autotune.report.values import spell

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
    found = search_data(search)
    if found is None:
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
    _draw_candidates(left, found)
    _draw_trials(right, found)
    figure.suptitle(f"update {search.step:,}: {search.action} {spell(found.lr)}", fontsize=11)
    return figure


def pixels(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The picture as an RGB array, shape (height, width, 3)."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()


def _draw_candidates(axes: Axes, found: SearchData) -> None:
    for status, (marker, colour) in _MARKERS.items():
        group = [c for c in found.candidates if c.status == status]
        if group:
            xs, ys = [c.lr for c in group], [c.height for c in group]
            axes.scatter(xs, ys, marker=marker, color=colour, label=status, zorder=3)
    if found.posterior:
        lr, mean, sd = np.asarray(found.posterior, dtype=np.float64).T
        axes.plot(lr, mean, color="tab:purple", label="posterior mean")
        axes.fill_between(lr, mean - 1.96 * sd, mean + 1.96 * sd, color="tab:purple", alpha=0.15, label="95 % band")
    if found.lr is not None:
        axes.axvline(found.lr, color="tab:green", linestyle="--", label="in use after it")
    ylabel = "progress left undone" if found.in_progress else "loss at the trial's end"
    axes.set(xscale="log", xlabel="learning rate", ylabel=ylabel)
    axes.legend(fontsize=7)


def _draw_trials(axes: Axes, found: SearchData) -> None:
    for candidate in found.candidates:
        curve = [(step, np.nan if loss is None else loss) for step, loss in candidate.curve]
        if curve:
            steps, values = np.asarray(curve, dtype=np.float64).T
            axes.plot(steps, values, linewidth=1.2, label=spell(candidate.lr))
    if found.view is not None:
        axes.set_ylim(*found.view)
    axes.set(xlabel="trial step", ylabel="loss")
    if axes.lines:
        axes.legend(fontsize=7, title="learning rate", title_fontsize=7)
