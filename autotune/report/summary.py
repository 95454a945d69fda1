"""What a run's tuning came to: how much it cost, what it saved, how often it changed its mind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from autotune._schedule_log import peaks_of
from autotune.decision import Decision
from autotune.report.reading import Run
from autotune.report.tracks import forecasts, losses
from autotune.report.values import mapping, number, records, settings, spell, spell_seconds


@dataclass(frozen=True)
class Summary:
    """Figures of one run.

    Attributes:
        real_steps: Updates that trained the model.
        trial_steps: Optimizer steps spent in trials and extra evaluations (an evaluation batch is a third).
        saved_steps: Trial steps that stopping hopeless candidates early did not take.
        lost_steps: Real updates that rollbacks undid.
        searches: Searches run; ``changes`` of them set another learning rate.
        rollbacks: How often a stage was undone.
        batch_changes: How often the batch grew or shrank.
        forecasts_scored: Predictions whose outcome is known; ``forecasts_inside`` of them held.
        seconds: Wall time of the fit; ``search_seconds`` of it in searches.
        budget: ``search_budget`` as configured, a share of ``planned``: the updates the run was planned with, which
            are more than it makes where the batch grows.
        final_lr: The last peak on record, growths of the batch counted.
        final_loss: The last monitored or validation loss on record.
    """

    real_steps: int
    trial_steps: float
    saved_steps: float
    lost_steps: float
    searches: int
    changes: int
    rollbacks: int
    batch_changes: int
    forecasts_scored: int
    forecasts_inside: int
    seconds: float | None
    search_seconds: float | None
    budget: float | None
    planned: float | None
    final_lr: float | None
    final_loss: float | None

    @property
    def share(self) -> float | None:
        """Trial steps over all optimizer steps of the run."""
        total = self.real_steps + self.trial_steps
        return self.trial_steps / total if total else None


def summarise(run: Run) -> Summary:
    """The figures of a run, from its log and, for the last loss, its metrics."""
    kinds = Counter((decision.kind, decision.action) for decision in run.decisions)
    # A run that was made longer has ended more than once, and may be on its way again.
    finish = next((decision for decision in reversed(run.decisions) if decision.kind == "finish"), None)
    ended = finish is not None and finish is run.decisions[-1]
    configured = settings(run.decisions)
    searches = [d for d in run.decisions if d.kind == "search" and d.action != "skip"]
    scored = [forecast for forecast in forecasts(run) if forecast.inside is not None]
    seconds = [value for d in searches if (value := number(d, "seconds")) is not None]
    return Summary(
        real_steps=int((_from_finish(finish, "real_steps") if ended else None) or run.last_step),
        trial_steps=sum(d.cost_steps for d in run.decisions if d.kind not in ("finish", "rollback")),
        saved_steps=sum(saved_steps(search) for search in searches),
        lost_steps=sum(number(d, "lost_steps") or 0.0 for d in run.decisions if d.kind == "rollback"),
        searches=len(searches),
        changes=kinds["search", "set_lr"],
        rollbacks=kinds["rollback", "roll_back"],
        batch_changes=sum(kinds["batch", action] for action in ("grow", "undo", "undo_growth")),
        forecasts_scored=len(scored),
        forecasts_inside=sum(bool(forecast.inside) for forecast in scored),
        seconds=_from_finish(finish, "seconds"),
        search_seconds=_from_finish(finish, "search_seconds") or (sum(seconds) if seconds else None),
        budget=number(configured, "search_budget"),
        planned=number(mapping(configured, "horizon"), "updates"),
        final_lr=_last_lr(run),
        final_loss=_last_loss(run, finish),
    )


def saved_steps(search: Decision) -> float:
    """Steps that a search's early stops did not take."""
    saved = 0.0
    for candidate in records(search, "candidates"):
        planned = number(candidate, "horizon_steps") or number(search, "horizon_steps")
        taken = number(candidate, "steps")
        if candidate.get("status") != "finished" and planned is not None and taken is not None:
            saved += max(planned - taken, 0.0)
    return saved


def rows(summary: Summary) -> list[tuple[str, str, str]]:
    """The summary for people: (what, value, what it means)."""
    share = "–" if summary.share is None else f"{100 * summary.share:.1f} % of all steps"
    if summary.budget is not None and summary.planned:
        of_plan = 100 * summary.trial_steps / summary.planned
        allowed = f"{100 * summary.budget:.0f} % allowed"
        share += f"; {of_plan:.1f} % of the {summary.planned:,.0f} updates that were planned ({allowed})"
    held = f"{summary.forecasts_inside} of {summary.forecasts_scored}" if summary.forecasts_scored else "–"
    return [
        ("Real updates", spell(summary.real_steps), "optimizer steps that trained the model"),
        ("Steps spent searching", spell(summary.trial_steps), share),
        ("Saved by early stopping", spell(summary.saved_steps), "trial steps that hopeless candidates did not take"),
        ("Searches", spell(summary.searches), f"{summary.changes} of them changed the learning rate"),
        ("Rollbacks", spell(summary.rollbacks), f"{spell(summary.lost_steps)} real updates were undone by them"),
        ("Batch changes", spell(summary.batch_changes), "how often the batch grew or shrank"),
        ("Forecasts that held", held, "the loss came to lie inside the interval predicted for it"),
        ("Time searching", spell_seconds(summary.search_seconds), _of(summary.seconds)),
        ("Last peak learning rate", spell(summary.final_lr), "of the first parameter group, before warm-up and decay"),
        ("Last loss", spell(summary.final_loss, 4), "monitored loss at the end"),
    ]


def _of(seconds: float | None) -> str:
    return "wall time of all searches" if seconds is None else f"of {spell_seconds(seconds)} in all"


def _from_finish(finish: Decision | None, key: str) -> float | None:
    return None if finish is None else number(finish, key)


def _last_lr(run: Run) -> float | None:
    found = peaks_of(run.decisions)
    return found[-1][1] if found else None


def _last_loss(run: Run, finish: Decision | None) -> float | None:
    if (loss := _from_finish(finish, "final_loss")) is not None:
        return loss
    curves = losses(run)
    curve = curves.get("validation") or curves.get("train")
    if curve is not None and len(curve[1].values):
        return float(curve[1].values[-1])
    found = [value for d in run.decisions if d.kind == "stage" and (value := number(d, "loss")) is not None]
    return found[-1] if found else None
