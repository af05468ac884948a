import pytest

from treepo_async.replay.spool import MemorySpool


def test_a_tree_is_read_as_it_was_stored_first():
    spool = MemorySpool()
    spool.append("a", [b"one", memoryview(b"two")])
    spool.append("a", [b"other"])
    assert spool.read("a") == [b"one", b"two"]


def test_retiring_a_step_forgets_the_trees_of_it_and_of_those_before():
    spool = MemorySpool()
    for lease_id in "abcd":
        spool.append(lease_id, [lease_id.encode()])
    spool.journal(0, ["a"])
    spool.journal(1, ["b"])
    spool.journal(2, ["c"])
    spool.retire(1)
    for lease_id in "ab":
        with pytest.raises(KeyError):
            spool.read(lease_id)
    assert (spool.read("c"), spool.read("d")) == ([b"c"], [b"d"])


def test_retiring_twice_does_nothing():
    spool = MemorySpool()
    spool.append("a", [b"a"])
    spool.journal(0, ["a"])
    spool.retire(0)
    spool.retire(0)
