from dataclasses import replace
from pathlib import Path

from treepo_async.config.wiring import Wiring, digest_of
from treepo_async.wire.hello import hello_of

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


def test_the_digest_of_a_file_follows_its_content_and_is_empty_without_one(tmp_path):
    file = tmp_path / "config.yaml"
    assert digest_of(file) == ""
    file.write_text("steps: 1\n")
    one = digest_of(file)
    file.write_text("steps: 2\n")
    assert len(one) == len(digest_of(file)) == 32
    assert digest_of(file) != one


def test_a_role_knows_the_digests_of_its_run(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 1\n")
    wiring = replace(WIRING, run_dir=str(tmp_path), model_dir=str(tmp_path), keys_dir="/keys")
    hello = hello_of(Wiring.parse(wiring.to_json()))
    assert (hello.name, hello.run_id) == ("actor-1", "r1")
    assert hello.config_digest == digest_of(tmp_path / "config.yaml")
    assert hello.tokenizer_digest == ""


def test_files_of_the_run_lie_in_its_folder():
    assert WIRING.config_file == Path("/runs/r1/config.yaml")
    assert WIRING.weights_dir == Path("/runs/r1/weights")
