import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.errors import RefusedError
from treepo_async.replay.peers import MAX_PEERS, SILENT_S, STRIKES, SUSPENDED_S, Peers
from treepo_async.wire.messages import PROTOCOL, AskBatch, Beat, Hello, Published, Retired, Trained

OLD, LATER, OTHER = b"actor-0:aaa", b"actor-0:bbb", b"actor-1:ccc"


def hello(name="actor-0", **changes):
    said = {"run_id": "run-a", "config_digest": "c0ffee", "tokenizer_digest": "70c"}
    return Hello(name=name, **{**said, **changes})


@pytest.fixture
def peers():
    return Peers(run_id="run-a", config_digest="c0ffee", tokenizer_digest="70c")


def refusal(call, *arguments):
    with pytest.raises(RefusedError) as caught:
        call(*arguments)
    return caught.value


def test_a_peer_that_has_not_greeted_is_told_to_and_passes_once_it_has(peers):
    error = refusal(peers.check, OLD, 0.0)
    assert (error.reason, error.retry) == ("hello_first", True)
    assert peers.greet(OLD, hello(), 1.0) is None
    peers.check(OLD, 2.0)
    assert peers.name_of(OLD) == "actor-0"


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"run_id": "run-b"}, "wrong_run", ["run-a", "run-b"]),
        ({"config_digest": "bad"}, "wrong_run", ["config.yaml", "c0ffee", "bad"]),
        ({"config_digest": ""}, "wrong_run", ["config.yaml", "c0ffee", "none"]),
        ({"tokenizer_digest": "bad"}, "wrong_run", ["tokenizer.json", "70c", "bad"]),
        ({"protocol": PROTOCOL + 1}, "protocol", [str(PROTOCOL), str(PROTOCOL + 1)]),
    ],
    ids=["run", "config", "no config", "tokenizer", "protocol"],
)
def test_a_peer_that_was_given_something_else_is_refused_with_both_sides(
    peers, changes, reason, words
):
    error = refusal(peers.greet, OLD, hello(**changes), 0.0)
    assert (error.reason, error.retry) == (reason, False)
    assert all(word in str(error) for word in words)
    assert refusal(peers.check, OLD, 0.0).reason == "hello_first"


def test_a_peer_without_a_tokenizer_is_let_in(peers):
    peers.greet(b"learner-0:x", hello("learner-0", tokenizer_digest=""), 0.0)
    peers.check(b"learner-0:x", 0.0)


def test_a_later_process_of_an_actor_takes_the_place_of_the_earlier_one_for_good(peers):
    peers.greet(OLD, hello(), 0.0)
    peers.greet(OTHER, hello("actor-1"), 0.0)
    assert peers.greet(LATER, hello(), 1.0) == "actor-0"
    for call in (lambda: peers.check(OLD, 2.0), lambda: peers.greet(OLD, hello(), 2.0)):
        error = refusal(call)
        assert (error.reason, error.retry) == ("fenced", False)
    peers.check(LATER, 2.0)
    peers.check(OTHER, 2.0)
    assert peers.actors() == {"actor-0", "actor-1"}


def test_greeting_again_fences_nobody(peers):
    peers.greet(OLD, hello(), 0.0)
    assert peers.greet(OLD, hello(), 1.0) is None
    peers.check(OLD, 2.0)


def test_a_later_learner_fences_the_earlier_one_too_but_it_held_no_leases(peers):
    peers.greet(b"learner-0:1", hello("learner-0"), 0.0)
    assert peers.greet(b"learner-0:2", hello("learner-0"), 1.0) is None
    assert refusal(peers.check, b"learner-0:1", 2.0).reason == "fenced"
    assert peers.actors() == frozenset()


def test_a_process_that_was_silent_while_a_later_one_came_stays_out(peers):
    peers.greet(OLD, hello(), 0.0)
    assert peers.forget_silent(SILENT_S) == ["actor-0"]
    peers.greet(LATER, hello(), SILENT_S + 1)
    assert refusal(peers.check, OLD, SILENT_S + 2).reason == "fenced"


def test_the_silent_do_not_count_until_they_speak_again(peers):
    peers.greet(OLD, hello(), 0.0)
    peers.greet(OTHER, hello("actor-1"), 0.0)
    peers.check(OTHER, 30.0)
    assert peers.forget_silent(SILENT_S) == ["actor-0"]
    assert peers.forget_silent(SILENT_S) == []
    assert peers.actors() == {"actor-1"}
    peers.check(OLD, SILENT_S + 1)
    assert peers.actors() == {"actor-0", "actor-1"}


def test_five_invalid_messages_in_a_minute_suspend_a_peer_for_a_minute(peers):
    peers.greet(OLD, hello(), 0.0)
    for second in range(STRIKES - 1):
        peers.strike(OLD, float(second))
    peers.check(OLD, 4.0)
    peers.strike(OLD, 10.0)
    error = refusal(peers.check, OLD, 20.0)
    assert (error.reason, error.retry, error.retry_after_s) == ("suspended", True, SUSPENDED_S - 10)
    assert refusal(peers.greet, OLD, hello(), 20.0).reason == "suspended"
    peers.check(OLD, 10.0 + SUSPENDED_S)
    peers.strike(OLD, 71.0)
    peers.check(OLD, 72.0)


def test_invalid_messages_far_apart_suspend_nobody(peers):
    peers.greet(OLD, hello(), 0.0)
    for i in range(4 * STRIKES):
        peers.strike(OLD, 16.0 * i)
        peers.check(OLD, 16.0 * i + 1)


def test_a_suspended_peer_is_nobody_elses_burden(peers):
    peers.greet(OLD, hello(), 0.0)
    for _ in range(STRIKES):
        peers.strike(b"mallory:1", 0.0)
    peers.check(OLD, 0.0)


def test_made_up_identities_do_not_fill_the_memory(peers):
    for i in range(3 * MAX_PEERS):
        peers.greet(b"x:%d" % i, hello(f"guest-{i}"), 0.0)
        for _ in range(STRIKES):
            peers.strike(b"y:%d" % i, 0.0)
        peers.strike(b"z:%d" % i, 0.0)
    sizes = [len(peers._peers), len(peers._strikes), len(peers._suspended)]
    assert max(sizes) <= MAX_PEERS
    assert len(peers.actors()) <= MAX_PEERS


@pytest.mark.parametrize(
    "message",
    [
        AskBatch(step=0, lineage=0, wait_s=1.0),
        Trained(step=0, lineage=0, digest="d"),
        Published(step=1, lineage=0, consumed_step=0),
        Retired(step=0),
    ],
    ids=lambda message: type(message).__name__,
)
def test_only_a_learner_may_move_the_queue_on(peers, message):
    peers.greet(OLD, hello(), 0.0)
    peers.greet(b"learner-0:1", hello("learner-0"), 0.0)
    error = refusal(peers.check_role, OLD, message)
    assert (error.reason, error.retry) == ("protocol", False)
    peers.check_role(b"learner-0:1", message)
    for peer in (OLD, b"learner-0:1"):
        peers.check_role(peer, Beat(leases=[]))


def test_the_name_of_a_peer_that_never_greeted_is_what_its_identity_claims(peers):
    assert peers.name_of(b"actor-7:abc") == "actor-7"
    assert isinstance(peers.name_of(b"\xff\x00"), str)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["greet", "check", "strike", "forget"]),
            st.integers(0, 2),
            st.integers(0, 2),
            st.floats(0, 40),
        ),
        max_size=60,
    )
)
def test_of_a_name_at_most_one_process_is_let_in_and_it_greeted_last(steps):
    peers = Peers(run_id="run-a", config_digest="", tokenizer_digest="")
    now, last = 0.0, {}
    for act, name, incarnation, seconds in steps:
        now += seconds
        peer = b"actor-%d:%d" % (name, incarnation)
        try:
            if act == "greet":
                peers.greet(peer, hello(f"actor-{name}"), now)
                last[name] = peer
            elif act == "check":
                peers.check(peer, now)
                assert last[name] == peer
            elif act == "strike":
                peers.strike(peer, now)
            else:
                peers.forget_silent(now)
        except RefusedError as error:
            if error.reason == "hello_first":
                assert last.get(name) != peer
        assert peers.actors() <= {f"actor-{known}" for known in last}
