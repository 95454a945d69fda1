"""From the peak of a trial to that of the run: what a rate that was found, or is usual, comes to where a run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autotune.search.strides import idle_steps, steps_made, trial_shares
from autotune.search.usual import cautious_lr, family_of, usual_lr
from autotune.stage.schedule import Shape
from autotune.stage.settings import LRSettings

if TYPE_CHECKING:
    from autotune.callbacks._lr_run import LRRun

#: Rate, action, reason, and the rate as a share of what was found.
Answer = tuple[float, str, str, float]


class RunPeaks:
    """The peaks of a run that begins, or is searched for, at one moment.

    Args:
        settings: The user's.
        run: The fit.
        progress: At that moment. A clock goes on during a search, and cannot be read from within.
    """

    def __init__(self, settings: LRSettings, run: LRRun, progress: float) -> None:
        self._settings = settings
        self._run = run
        self._progress = progress

    @property
    def family(self) -> str:
        """The optimizer's, by the name of its class, or of the base class that is known."""
        return family_of(self._run.optimizer)

    @property
    def share(self) -> float:
        """A trial's mean share of its peak over that of what is left of the run: one that holds its peak bears less."""
        shape = self._run.plan.shape
        if self._run.driver.scheduled or not shape.decay:
            return 1.0
        return Shape(warmup=0.0).mean() / shape.mean(self._progress)

    @property
    def start(self) -> float:
        """The share of what is found with which a run begins that begins now."""
        return self._run.climb.start_at(self._progress)

    @property
    def usual(self) -> float | None:
        """What is usual for the optimizer as the peak of a run, as the peak of a trial that comes to the same."""
        usual = usual_lr(self.family)
        return None if usual is None else usual / self.share

    @property
    def default(self) -> float:
        """A cautious peak, for a run of which nothing is known."""
        return self._settings.clip(cautious_lr(self.family))

    @property
    def idle(self) -> int:
        """First steps of a trial that say nothing of its rate."""
        optimizer = self._run.optimizer
        return idle_steps(self.family, optimizer.param_groups[0], steps_made(optimizer))

    def trial_shares(self, trial: int, run: int) -> tuple[float, ...]:
        """What a trial's rates are multiplied by, so that its steps are as long as those of the run that is left.

        Args:
            trial: Steps of the trial.
            run: Steps of the run that is left.
        """
        optimizer, start = self._run.optimizer, min(self._progress, 1.0)
        shape = self._run.plan.shape
        return trial_shares(
            self.family,
            optimizer.param_groups[0],
            trial,
            run,
            made=steps_made(optimizer),
            shape=lambda place: shape(start + (1.0 - start) * place),
        )

    def opening(self, lr: float, reason: str) -> Answer:
        """The first peak: the run's mean rate is to be that of the trial it rests on, which holds no peak."""
        if (share := self.share) != 1.0:
            why = "the run holds its peak" if share < 1.0 else "the rate is coming down already"
            lr, reason = lr * share, f"{reason}, times {share:.2f} because {why}"
        if (start := self.start) != 1.0:
            reason = f"{reason}, times {start:.2f} because it can rise from there"
        answer = self._settings.clip(lr)
        lr = self._settings.clip(answer * start)
        return lr, "set_lr", reason, lr / answer
