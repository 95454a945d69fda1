"""What the gradients say: one record of sufficient statistics, its producers, the formulas that read it."""

from autotune.noise.smoothing import NoiseEstimate, NoiseSmoother, NoiseState
from autotune.noise.statistics import ChunkSums, GradientRecord

__all__ = ["ChunkSums", "GradientRecord", "NoiseEstimate", "NoiseSmoother", "NoiseState"]
