"""One Megatron process group and two tiny models for every test of the learner."""

from pathlib import Path

import pytest

from treepo_async.process import free_ports


@pytest.fixture(scope="session")
def groups():
    """A world of one rank, open until the last test has run."""
    from treepo_async.config.layout import Layout
    from treepo_async.learner.groups import close_groups, open_groups

    (port,) = free_ports(1)
    open_groups(Layout(), rank=0, address=f"127.0.0.1:{port}", timeout_s=30.0)
    yield
    close_groups()


@pytest.fixture(scope="session", params=["untied", "tied"])
def model_dir(request, tmp_path_factory) -> Path:
    """A tiny Qwen2 checkpoint on disk, once with an output layer of its own and once tied; named so."""
    from tests.oracle import tiny_qwen2

    path = tmp_path_factory.mktemp(request.param, numbered=False)
    tiny_qwen2(tied=request.param == "tied").save_pretrained(path)
    return path
