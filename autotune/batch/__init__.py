"""How many examples next: tests of the noise, a controller, a plan, a sampler, and the learning rate's part."""

from autotune.batch.controller import BatchController, BatchState, Target
from autotune.batch.plan import Split, plan
from autotune.batch.sampler import ResizableBatchSampler

__all__ = ["BatchController", "BatchState", "ResizableBatchSampler", "Split", "Target", "plan"]
