"""What a controller of the batch says of its decisions: a sentence, and the numbers behind it."""

from __future__ import annotations

from typing import Any

from autotune.batch.plan import Split


def changed(split: Split, before: Split, gain: float) -> dict[str, Any]:
    """The batch becomes ``split``, and the rate ``gain`` times what it was."""
    return {
        "batch": split.examples,
        "batch_before": before.examples,
        "micro": split.micro,
        "accumulate": split.accumulate,
        "lr_gain": gain,
    }


def undone(split: Split, grown: Split, gain: float, whole: int, losses: dict[str, float]) -> tuple[str, dict[str, Any]]:
    """A growth is taken back; ``whole`` is the first update that is made of the smaller batch alone."""
    reason = (
        f"the loss went from {losses['loss_before']:.4g} to {losses['loss_after']:.4g} after the batch had grown "
        f"to {grown.examples}: weights, optimizer and batch go back"
    )
    return reason, {**changed(split, grown, gain), "batch_from": whole, **losses}


def taken_apart(examples: int, pieces: int, limit: int | None) -> tuple[str, dict[str, Any]]:
    """A micro-batch did not fit into memory."""
    reason = (
        f"memory ran out on a micro-batch of {examples}: it was repeated in {pieces} pieces, and micro-batches "
        f"above {limit} are run in pieces from now on"
    )
    return reason, {"micro": examples, "pieces": pieces, "piece_limit": limit}


def finished(step: int, split: Split, grown: int) -> tuple[str, dict[str, Any]]:
    """The run has ended after ``step`` updates and so many growths."""
    now = split.examples
    reason = f"the run ended after {step} updates, at {now} examples an update; the batch grew {grown} times"
    return reason, {"real_steps": step, "batch": now}
