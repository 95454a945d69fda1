from pathlib import Path

import pytest

from autotune.callbacks import _lr_search
from autotune.stage.policy import SearchPolicy

#: What Lightning says of every small run, and torch of Lightning.
_USUAL = (
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:The number of training batches",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The dirpath has changed from",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:You're resuming from a checkpoint that ended before the epoch",
)


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for rule in _USUAL:
                item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture
def several_searches(monkeypatch):
    """Searches so small that a run of 120 updates has several of them."""
    small = SearchPolicy(coarse=3, fine=0, shortest_fine=3)
    monkeypatch.setattr(_lr_search, "SearchPolicy", lambda: small)
