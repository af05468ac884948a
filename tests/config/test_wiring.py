from pathlib import Path

from treepo_async.config.wiring import Wiring

WIRING = Wiring(
    run_id="r1",
    run_dir="/runs/r1",
    model_dir="/cache/tiny",
    replay_endpoint="tcp://127.0.0.1:1",
    gate_endpoint="tcp://127.0.0.1:2",
    engine_url="http://127.0.0.1:3",
    role="actor-1",
    index=1,
)


def test_a_wiring_is_one_line_that_reads_back():
    assert "\n" not in WIRING.to_json()
    assert Wiring.parse(WIRING.to_json()) == WIRING


def test_files_of_the_run_lie_in_its_folder():
    assert WIRING.config_file == Path("/runs/r1/config.yaml")
    assert WIRING.weights_dir == Path("/runs/r1/weights")
