import pytest

from treepo_async.replay.spool import MemorySpool


def test_a_tree_is_read_as_it_was_stored_first():
    spool = MemorySpool()
    spool.append("a", [b"one", memoryview(b"two")])
    spool.append("a", [b"other"])
    assert spool.read("a") == [b"one", b"two"]


def test_a_forgotten_tree_is_gone_and_forgetting_it_again_does_nothing():
    spool = MemorySpool()
    for lease_id in "ab":
        spool.append(lease_id, [lease_id.encode()])
    for _ in range(2):
        spool.forget(["a", "never"])
    assert (spool.holds("a"), spool.holds("b")) == (False, True)
    with pytest.raises(KeyError):
        spool.read("a")
    assert spool.read("b") == [b"b"]
