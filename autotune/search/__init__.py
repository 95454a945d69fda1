"""Which learning rate next: space, surrogate, acquisition, stopping of hopeless trials, ask and tell."""

from autotune.search.acquisition import Proposal
from autotune.search.bracket import BracketSearch
from autotune.search.grid import GridSearch
from autotune.search.optimizer import LRSearch
from autotune.search.published import PublishedSearch
from autotune.search.space import LogSpace
from autotune.search.state import Outcome, PosteriorRow, Recommendation, Search, SearchState
from autotune.search.stopping import TrialStopper, Verdict

__all__ = [
    "BracketSearch",
    "GridSearch",
    "LRSearch",
    "LogSpace",
    "Outcome",
    "PosteriorRow",
    "Proposal",
    "PublishedSearch",
    "Recommendation",
    "Search",
    "SearchState",
    "TrialStopper",
    "Verdict",
]
