"""Two tiny models for every test of the learner."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session", params=["untied", "tied"])
def model_dir(request, tmp_path_factory) -> Path:
    """A tiny Qwen2 checkpoint on disk, once with an output layer of its own and once tied; named so."""
    from tests.oracle import tiny_qwen2

    path = tmp_path_factory.mktemp(request.param, numbered=False)
    tiny_qwen2(tied=request.param == "tied").save_pretrained(path)
    return path
