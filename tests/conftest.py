"""Every test process computes on one thread: two of them side by side beat one with two, and figures repeat.

Every test begins with the same seeds, so that none depends on which ran before it in its process.
"""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
