from treepo_async.engine.pulse import PROBE_S, Pulse

HANG_S = 60.0


def started():
    pulse = Pulse(HANG_S)
    pulse.begin(0.0)
    return pulse


def test_a_server_whose_counters_move_under_load_lives_however_long_its_requests_take():
    pulse = started()
    for second in range(1, 1000):
        pulse.see({"used": second}, 5, float(second))
        assert not pulse.hangs(second)
        assert not pulse.wants_probe(second), "it has work"


def test_a_server_whose_counters_stand_still_under_load_hangs_after_the_deadline():
    pulse = started()
    for second in range(1, 61):
        pulse.see({"used": 7}, 5, float(second))
        assert not pulse.hangs(second)
    pulse.see({"used": 7}, 5, 62.0)
    assert pulse.hangs(62.0)
    pulse.see({"used": 8}, 5, 63.0)
    assert not pulse.hangs(63.0)


def test_a_server_that_answers_nothing_hangs_after_the_deadline():
    pulse = started()
    pulse.see({}, 0, 10.0)
    assert not pulse.hangs(69.0)
    assert pulse.silent_s(69.0) == 59.0
    assert pulse.hangs(71.0)


def test_an_idle_server_is_probed_now_and_then_and_lives_while_it_answers():
    pulse, num_probes = started(), 0
    for second in range(1, 101):
        pulse.see({}, 0, float(second))
        if pulse.wants_probe(second):
            num_probes += 1
            pulse.probed(second, answered=True)
        assert not pulse.hangs(second)
    assert num_probes == 100 // (PROBE_S + 1)


def test_an_idle_server_that_does_not_answer_its_probe_hangs():
    pulse = started()
    for second in range(1, 12):
        pulse.see({}, 0, float(second))
    assert pulse.wants_probe(11.0)
    assert not pulse.wants_probe(12.0), "one at a time"
    for second in range(12, 80):
        pulse.see({}, 0, float(second))
    assert pulse.hangs(79.0)


def test_a_probe_without_an_answer_is_forgiven_to_a_server_that_has_got_work_since():
    pulse = started()
    pulse.see({}, 0, 11.0)
    assert pulse.wants_probe(11.0)
    for second in range(12, 200):
        pulse.see({"used": second}, 9, float(second))
    pulse.probed(71.0, answered=False)
    assert not pulse.hangs(199.0)
    for second in range(200, 400):
        pulse.see({"used": 199 + (second == 200)}, 0, float(second))
    assert not pulse.hangs(399.0), "idle again, and not doubted any more"


def test_a_server_that_was_started_again_has_its_time_anew():
    pulse = started()
    pulse.see({}, 3, 1.0)
    assert pulse.hangs(100.0)
    pulse.begin(100.0)
    assert not pulse.hangs(159.0)
