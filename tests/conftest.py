"""Every test process computes on one thread: two of them side by side beat one with two, and figures repeat.

Every test begins with the same seeds and with the searches that users get, so that none depends on which ran before
it in its process.
"""

import os
import random
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from autotune.stage.policy import SearchPolicy

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_beginning(monkeypatch):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    searches = sys.modules.get("autotune.callbacks._lr_search")
    if searches is not None:
        monkeypatch.setattr(searches, "SearchPolicy", SearchPolicy)
