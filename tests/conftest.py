"""Every test process computes on one thread: two of them side by side beat one with two, and figures repeat."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
