import pytest
from tiny_run import TinyRun


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return TinyRun(tmp_path_factory.mktemp("run_a")).run()


@pytest.fixture(scope="session")
def other_tiny(tmp_path_factory):
    return TinyRun(tmp_path_factory.mktemp("run_b"), seed=1, lrs=(0.01, 0.1)).run()
