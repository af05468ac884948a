import json

from treepo_async.replay.quarantine import BURST, EVERY_S, KEPT_BYTES, MAX_FRAMES, Quarantine


def test_the_reason_the_lengths_and_the_first_bytes_are_kept(tmp_path):
    name = Quarantine(tmp_path / "quarantine").keep("step_S has 9", [b"head", b"x" * 10_000])
    found = json.loads((tmp_path / "quarantine" / name).read_text())
    assert found["reason"] == "step_S has 9"
    assert found["frame_bytes"] == [4, 10_000]
    assert bytes.fromhex(found["begins"]) == b"head" + b"x" * (KEPT_BYTES - 4)


def test_no_more_files_than_allowed_are_kept_and_the_newest_are(tmp_path):
    quarantine = Quarantine(tmp_path, max_files=3)
    for i in range(8):
        quarantine.keep(f"reason {i}", [b""])
    reasons = {json.loads(file.read_text())["reason"] for file in tmp_path.iterdir()}
    assert reasons == {"reason 5", "reason 6", "reason 7"}


def test_a_message_of_very_many_frames_gives_a_small_file(tmp_path):
    name = Quarantine(tmp_path).keep("r" * 10**6, [memoryview(b"a")] * 100_000)
    file = tmp_path / name
    assert len(json.loads(file.read_text())["frame_bytes"]) == MAX_FRAMES
    assert file.stat().st_size < 5 * KEPT_BYTES


def test_where_nothing_can_be_written_the_caller_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    assert Quarantine(tmp_path / "file" / "folder").keep("reason", [b"x"]) == ""


def test_of_a_flood_a_burst_is_kept_and_then_one_at_a_time(tmp_path):
    now = [0.0]
    quarantine = Quarantine(tmp_path, clock=lambda: now[0])
    assert sum(quarantine.keep("flood", [b"x"]) != "" for _ in range(1000)) == BURST
    for _ in range(3):
        now[0] += EVERY_S
        assert [quarantine.keep("flood", [b"x"]) != "" for _ in range(3)] == [True, False, False]
    now[0] += 1e6
    assert sum(quarantine.keep("flood", [b"x"]) != "" for _ in range(1000)) == BURST
