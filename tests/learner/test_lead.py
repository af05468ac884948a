"""A learner on two nodes as two processes of this machine: ranks that end, die or hang; no process group, no model."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from treepo_async.errors import ConfigError, TreepoError
from treepo_async.learner.follow import Follower
from treepo_async.learner.group_line import Line, LineError, group_secret, is_proof, proof
from treepo_async.learner.lead import Leader, listen
from treepo_async.process import free_ports

SECRET = b"of the run"
SOON_S = 20.0
FORK = multiprocessing.get_context("fork")


def note(folder, number):
    (folder / f"{number}-{os.getpid()}").touch()


def num_starts(folder, number):
    return len(list(folder.glob(f"{number}-*")))


def wait_for(holds, what):
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def end_well(folder, _said, number):
    note(folder, number)


def die_once(folder, _said, number, *, who):
    """In the first start one rank is killed, and the others hang, as in a collective."""
    is_first = num_starts(folder, number) == 0
    note(folder, number)
    if is_first:
        if number == who:
            wait_for(lambda: all(num_starts(folder, n) for n in range(4)), "all ranks to start")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SOON_S)


def fail(folder, _said, number, *, who):
    note(folder, number)
    if number == who:
        raise ConfigError("learner.lr")
    time.sleep(SOON_S)


def hang_in_first(folder, _said, number):
    is_first = num_starts(folder, number) == 0
    note(folder, number)
    if is_first:
        time.sleep(SOON_S)


def follow(address, secret, work, folder, first=2):
    follower = Follower(
        address,
        secret,
        "learner-1",
        range(first, first + 2),
        lambda said: partial(work, folder, said),
        SOON_S,
        on_join=partial(_add_join, folder),
        on_over=(folder / "over").touch,
    )
    follower.run()


def _add_join(folder):
    with (folder / "joined").open("a") as file:
        file.write("x")


@pytest.fixture
def address():
    (port,) = free_ports(1)
    return f"127.0.0.1:{port}"


@pytest.fixture
def follower(address):
    """`follower(work, folder)` starts the process of the second node."""
    processes = []

    def start(work, folder, secret=SECRET):
        args = (address, secret, work, folder)
        processes.append(FORK.Process(target=follow, args=args, daemon=False))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def lead(address, work, folder, *, max_restarts=1, join_timeout_s=SOON_S, starts=None):
    """Ranks 0 and 1, and the lead, in this process."""

    def make_start():
        number = 0 if starts is None else len(starts)
        if starts is not None:
            starts.append(number)
        return partial(work, folder, {}), {"number": number}

    with closing(listen(address)) as listener:
        Leader(
            listener, SECRET, 4, range(2), make_start, max_restarts, join_timeout_s, end_s=3.0
        ).run()


def alive(folder):
    pids = [int(file.name.partition("-")[2]) for file in folder.glob("?-*")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_all_ranks_of_both_nodes_run_once_and_both_processes_end_well(tmp_path, address, follower):
    other = follower(end_well, tmp_path)
    lead(address, end_well, tmp_path)
    other.join(SOON_S)
    assert other.exitcode == 0
    assert sorted(file.name[0] for file in tmp_path.glob("?-*")) == ["0", "1", "2", "3"]
    assert (tmp_path / "over").exists()


def test_a_follower_that_is_asked_to_end_does_not_say_that_all_is_over(tmp_path, address):
    def end_when_asked():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        follow(address, SECRET, end_well, tmp_path)

    with closing(listen(address)) as listener:
        other = FORK.Process(target=end_when_asked, daemon=False)
        other.start()
        line = Line(listener.accept()[0])
        line.send(nonce="mine")
        said = line.receive_one(SOON_S)
        line.send(proof=proof(SECRET, "lead", said["nonce"], "mine"))
        wait_for((tmp_path / "joined").exists, "the follower to join")
        other.terminate()
        other.join(SOON_S)
        line.close()
    assert other.exitcode == 0
    assert not (tmp_path / "over").exists()


@pytest.mark.parametrize("who", [1, 3])
def test_a_rank_that_is_killed_on_either_node_ends_the_start_on_both_and_all_begin_again(
    tmp_path, address, follower, who
):
    other, starts = follower(partial(die_once, who=who), tmp_path), []
    began = time.monotonic()
    lead(address, partial(die_once, who=who), tmp_path, starts=starts)
    assert time.monotonic() - began < SOON_S, "nobody waited for those that hung"
    assert starts == [0, 1]
    assert [num_starts(tmp_path, rank) for rank in range(4)] == [2, 2, 2, 2]
    other.join(SOON_S)
    assert other.exitcode == 0
    assert (tmp_path / "joined").read_text() == "x", "the node did as it was told, and stayed"
    assert alive(tmp_path) == []


@pytest.mark.parametrize("who", [0, 2])
def test_a_cause_that_lies_in_the_run_ends_it_wherever_the_rank_was(
    tmp_path, address, follower, who
):
    follower(partial(fail, who=who), tmp_path)
    with pytest.raises(TreepoError, match=rf"rank {who}: ConfigError: learner\.lr"):
        lead(address, partial(fail, who=who), tmp_path, max_restarts=5)
    assert num_starts(tmp_path, who) == 1


def test_too_many_deaths_end_the_run_with_the_cause(tmp_path, address, follower):
    follower(partial(die_once, who=3), tmp_path)
    with pytest.raises(TreepoError, match="gave up after 0 restarts: learner-1: rank 3 was killed"):
        lead(address, partial(die_once, who=3), tmp_path, max_restarts=0)


def test_a_node_process_that_dies_joins_the_next_start_when_it_is_there_again(
    tmp_path, address, follower
):
    first = follower(hang_in_first, tmp_path)

    def replace_node():
        wait_for(lambda: all(num_starts(tmp_path, n) for n in range(4)), "all ranks to start")
        os.kill(first.pid, signal.SIGKILL)
        follow(address, SECRET, hang_in_first, tmp_path)

    again = FORK.Process(target=replace_node, daemon=False)
    again.start()
    lead(address, hang_in_first, tmp_path)
    again.join(SOON_S)
    assert again.exitcode == 0
    assert [num_starts(tmp_path, rank) for rank in range(4)] == [2, 2, 2, 2]


def test_a_leader_that_dies_is_followed_again_when_it_is_there_again(tmp_path, address, follower):
    other = follower(hang_in_first, tmp_path)
    first = FORK.Process(target=lead, args=(address, hang_in_first, tmp_path), daemon=False)
    first.start()
    wait_for(lambda: all(num_starts(tmp_path, n) for n in range(4)), "all ranks to start")
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    lead(address, hang_in_first, tmp_path)
    other.join(SOON_S)
    assert other.exitcode == 0
    assert num_starts(tmp_path, 3) == 2


def test_a_node_that_does_not_come_is_named_by_its_ranks(tmp_path, address):
    with pytest.raises(TreepoError, match=r"ranks 2, 3 have no node: .* within 0\.2 s"):
        lead(address, end_well, tmp_path, join_timeout_s=0.2)
    assert num_starts(tmp_path, 0) == 0


def test_a_leader_that_is_not_there_is_named_by_its_address(tmp_path, address):
    follower = Follower(
        address, SECRET, "learner-1", range(2, 4), lambda _: print, 0.2, print, print
    )
    with pytest.raises(
        TreepoError, match=rf"learner-1 did not reach .* at {address} within 0\.2 s"
    ):
        follower.run()


def test_who_does_not_know_the_secret_is_not_let_in(tmp_path, address, follower):
    stranger = follower(end_well, tmp_path, secret=b"another")
    with pytest.raises(TreepoError, match="ranks 2, 3 have no node"):
        lead(address, end_well, tmp_path, join_timeout_s=1.0)
    assert stranger.is_alive()
    assert not (tmp_path / "joined").exists()


SAID = '{"nonce": "n", "role": "r", "first_rank": 2, "num_ranks": 2, "proof": %s}\n'
DEEP = "[" * 30_000 + "]" * 30_000
NONSENSE = (
    b"",
    b"nonsense\n",
    b"[1]\n",
    b"{}\n",
    b'{"proof": 3}\n',
    b"x" * 10,
    (SAID % '"é"').encode(),
    (SAID % r'"\ud800"').encode(),
    f"{DEEP}\n".encode(),
    (SAID % '"x"').replace('"n"', "[" * 900 + "]" * 900).encode(),
    b"9" * 5000 + b"\n",
)


@pytest.mark.parametrize(
    "data", NONSENSE[6:], ids=["no ASCII", "surrogate", "deep", "deep nonce", "digits"]
)
def test_one_line_of_a_stranger_ends_no_leader(tmp_path, address, data):
    stranger = FORK.Process(target=_say_and_wait, args=(address, data), daemon=True)
    stranger.start()
    with pytest.raises(TreepoError, match="ranks 2, 3 have no node"):
        lead(address, end_well, tmp_path, join_timeout_s=0.3)
    stranger.join(SOON_S)
    assert stranger.exitcode == 0, "it was hung up on"


def _say_and_wait(address, data):
    wait_for(lambda: _connects(address, b""), "the leader to listen")
    with socket.create_connection(_pair(address)) as connection:
        connection.sendall(data)
        while connection.recv(4096):
            pass


@pytest.mark.parametrize(
    "changed", [{"nonce": ["n"]}, {"role": 3}, {"first_rank": "2"}, {"num_ranks": True}]
)
def test_words_of_another_kind_are_refused_also_with_a_right_proof(changed):
    said = {"nonce": "n", "role": "learner-1", "first_rank": 2, "num_ranks": 2} | changed
    said["proof"] = proof(SECRET, "follow", "mine", *said.values())
    line = object()
    leader = Leader(None, SECRET, 4, range(2), None, 0, 1.0, _strangers={line: "mine"})
    with pytest.raises(LineError, match="what no node says"):
        leader._proven(line, said)


def test_a_stranger_that_says_nothing_or_nonsense_holds_nobody_up(tmp_path, address, follower):
    def disturb():
        wait_for(lambda: _connects(address, b""), "the leader to listen")
        kept = []
        for data in NONSENSE:
            kept.append(socket.create_connection(_pair(address)))
            kept[-1].sendall(data)
        time.sleep(SOON_S)

    noise = FORK.Process(target=disturb, daemon=True)
    noise.start()

    def late(folder, said, number):
        end_well(folder, said, number)

    other = FORK.Process(
        target=lambda: (time.sleep(0.5), follow(address, SECRET, late, tmp_path)), daemon=False
    )
    other.start()
    lead(address, end_well, tmp_path)
    noise.kill()
    other.join(SOON_S)
    assert other.exitcode == 0


def _pair(address):
    host, _, port = address.rpartition(":")
    return host, int(port)


def _connects(address, data):
    try:
        with socket.create_connection(_pair(address)) as connection:
            connection.sendall(data)
            return True
    except OSError:
        return False


def test_a_leader_that_does_not_know_the_secret_is_not_followed(tmp_path, address, follower):
    with closing(listen(address)) as listener:
        other = follower(end_well, tmp_path)
        connection, _ = listener.accept()
        line = Line(connection)
        line.send(nonce="mine")
        said = line.receive_one(SOON_S)
        assert is_proof(
            said["proof"], SECRET, "follow", "mine", said["nonce"], "learner-1", 2, 2
        ), "it shows that it knows the secret, without saying it"
        line.send(proof=proof(b"another", "lead", said["nonce"], "mine"))
        line.send(say="begin", generation=1)
        with pytest.raises(LineError):
            line.receive_one(SOON_S)
        assert other.is_alive()
    assert list(tmp_path.glob("2-*")) == []


def test_what_comes_behind_the_handshake_is_not_lost(tmp_path, address, follower):
    with closing(listen(address)) as listener:
        follower(end_well, tmp_path)
        connection, _ = listener.accept()
        line = Line(connection)
        line.send(nonce="mine")
        said = line.receive_one(SOON_S)
        greeting = proof(SECRET, "lead", said["nonce"], "mine")
        connection.sendall(
            f'{{"proof": "{greeting}"}}\n{{"say": "begin", "generation": 1}}\n'.encode()
        )
        assert line.receive_one(SOON_S) == {"say": "done", "generation": 1}


def test_the_secret_of_a_run_is_made_once_and_is_its_owners_alone(tmp_path):
    found = group_secret(tmp_path)
    assert group_secret(tmp_path) == found
    assert len(found) == 64
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
