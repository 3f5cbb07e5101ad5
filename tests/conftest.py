"""Fixtures of more than one file. The first is for every test."""

import pytest
from test_run import save_model, tidy


@pytest.fixture(autouse=True)
def tidy_process(request):
    with tidy(on_cpu=request.node.get_closest_marker("cuda") is None):
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("qwen2"))
