"""What there is to draw of one search, apart from drawing it.

A search's surrogate does not work in losses but in ``u``, the share of the progress that a trial leaves undone: 0 for
the best trial of its length, 1 for a trial that ends where it began (:mod:`autotune.search.surrogate`). On that scale
trials of different lengths and the posterior share one axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.decision import Decision
from autotune.report.values import column, mapping, number, pairs, records

#: Where a trial that exploded is drawn, in u; as in the surrogate.
CEILING = 1.2


@dataclass(frozen=True)
class Candidate:
    """One trial.

    Attributes:
        lr: Its learning rate.
        loss: At its end, or where it stopped; None where it is no finite number.
        steps: Steps it took, of ``horizon_steps``.
        status: ``"finished"``, ``"stopped"`` or ``"diverged"``.
        reason: Why it was tried, or ended.
        curve: (step, loss) pairs.
        height: Where it is drawn: u where ``SearchData.in_progress``, else the loss.
    """

    lr: float
    loss: float | None
    steps: float | None
    horizon_steps: float | None
    status: str
    reason: str
    curve: tuple[tuple[float, float | None], ...]
    height: float


@dataclass(frozen=True)
class SearchData:
    """One search.

    Attributes:
        candidates: In the order in which they were tried.
        in_progress: Heights are in u, and the posterior can be drawn with them.
        posterior: Rows of (lr, mean, sd); empty without one or where heights are losses.
        acquisition: Rows of (lr, value).
        lr: The rate in use after it.
    """

    candidates: tuple[Candidate, ...]
    in_progress: bool
    posterior: tuple[tuple[float, float, float], ...]
    acquisition: tuple[tuple[float, float], ...]
    lr: float | None

    @property
    def view(self) -> tuple[float, float] | None:
        """Losses between which the trials that did not explode can be told apart; None where all fit anyway."""
        sane = [c for c in self.candidates if c.status != "diverged"]
        values = [loss for c in sane for _, loss in c.curve if loss is not None]
        if not values or len(sane) == len(self.candidates):
            return None
        margin = 0.05 * (max(values) - min(values)) or 0.1 * abs(max(values)) or 1.0
        return min(values) - margin, max(values) + margin


def search_data(search: Decision) -> SearchData | None:
    """What can be drawn of a search; None where nothing was tried."""
    raw = [c for c in records(search, "candidates") if (lr := number(c, "lr")) is not None and lr > 0]
    if not raw:
        return None
    heights = _progress_left(raw, number(search, "initial_loss"))
    in_progress = heights is not None
    drawn = _losses(raw, number(search, "initial_loss")) if heights is None else heights
    lr = number(search, "lr")
    candidates = tuple(_candidate(c, height) for c, height in zip(raw, drawn, strict=True))
    posterior = mapping(search, "posterior") if in_progress else {}
    rates = column(posterior, "lr")
    rows = zip(rates, column(posterior, "mean"), column(posterior, "sd"), strict=False)
    values = zip(rates, column(posterior, "acquisition"), strict=False)
    return SearchData(
        candidates=candidates,
        in_progress=in_progress,
        posterior=tuple((x, m, s) for x, m, s in rows if x is not None and m is not None and s is not None),
        acquisition=tuple((x, y) for x, y in values if x is not None and y is not None),
        lr=lr if lr is not None and lr > 0 else None,
    )


def _candidate(raw: Mapping[str, Any], height: float) -> Candidate:
    return Candidate(
        lr=number(raw, "lr") or 0.0,
        loss=number(raw, "loss"),
        steps=number(raw, "steps"),
        horizon_steps=number(raw, "horizon_steps"),
        status=str(raw.get("status", "finished")),
        reason=str(raw.get("reason") or ""),
        curve=tuple(pairs(raw, "curve")),
        height=height,
    )


def _progress_left(raw: Sequence[Mapping[str, Any]], start: float | None) -> list[float] | None:
    """Each candidate's ``u``, or None where a length has no trial that made progress."""
    if start is None:
        return None
    best: dict[float | None, float] = {}
    for candidate in raw:
        loss, horizon = number(candidate, "loss"), number(candidate, "horizon_steps")
        if loss is not None and candidate.get("status", "finished") == "finished":
            best[horizon] = min(best.get(horizon, loss), loss)
    found = []
    for candidate in raw:
        loss, lowest = number(candidate, "loss"), best.get(number(candidate, "horizon_steps"))
        if lowest is None or lowest >= start:
            return None
        exploded = loss is None or candidate.get("status") == "diverged"
        found.append(CEILING if exploded or loss is None else min((loss - lowest) / (start - lowest), CEILING))
    return found


def _losses(raw: Sequence[Mapping[str, Any]], start: float | None) -> list[float]:
    """Losses, those that would flatten all the others drawn just above them."""
    finite = [y for c in raw if c.get("status") != "diverged" and (y := number(c, "loss")) is not None]
    if not finite:
        return [start or 1.0] * len(raw)
    top = max(finite) + 0.1 * (max(finite) - min(finite) or abs(max(finite)) or 1.0)
    losses = [number(c, "loss") for c in raw]
    return [top if loss is None else min(loss, top) for loss in losses]
