"""Fixtures of the run-level tests, test_run.py and test_training.py."""

import pytest


@pytest.fixture(autouse=True)
def tidy_process():
    from test_run import tidy

    with tidy():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from test_run import save_model

    return save_model(tmp_path_factory.mktemp("qwen2"))
