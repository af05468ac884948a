from dataclasses import replace
from pathlib import Path

import pytest

from treepo_async.engine.api_key import ensure_key
from treepo_async.engine.server import ServerOptions, command

OPTIONS = ServerOptions(7000, "float32", 512, None, 8, 64, Path("sglang.log"))


def words(*, updates_under_load, cuda):
    options = replace(OPTIONS, updates_under_load=updates_under_load)
    return command(options, Path("model"), "0.3", cuda=cuda)


def value(flag, found):
    return found[found.index(flag) + 1]


@pytest.mark.parametrize("cuda", [True, False])
def test_the_key_is_in_no_command_line(tmp_path, cuda):
    file = tmp_path / "key.yaml"
    key = ensure_key(file)
    found = command(replace(OPTIONS, key_file=file), Path("model"), "0.3", cuda=cuda)
    assert value("--config", found) == str(file)
    assert value("--host", found) == "127.0.0.1"
    assert not any(key in word for word in found)
    assert "--config" not in words(updates_under_load=False, cuda=cuda)


@pytest.mark.parametrize("cuda", [True, False])
def test_updates_under_load_need_exact_spans_and_a_queue_with_priorities(cuda):
    found = words(updates_under_load=True, cuda=cuda)
    assert found.count("--disable-overlap-schedule") == 1
    assert "--enable-priority-scheduling" in found
    assert value("--schedule-policy", found) == "fcfs"


def test_a_drained_server_overlaps_on_cuda_and_groups_requests_by_prefix():
    found = words(updates_under_load=False, cuda=True)
    assert "--disable-overlap-schedule" not in found
    assert "--enable-priority-scheduling" not in found
    assert value("--schedule-policy", found) == "lpm"
    assert "--disable-overlap-schedule" in words(updates_under_load=False, cuda=False)
