import json

from treepo_async.bench import machine


def test_every_start_is_noted_with_what_is_installed_and_what_else_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    file = tmp_path / "environment.json"
    machine.note(file)
    machine.note(file, device="cpu")
    first, second = json.loads(file.read_text())
    assert first["numpy"].count(".") == 2
    assert first["no-such-package"] is None
    assert first["memory_gib"] > 0.5
    assert "device" not in first
    assert second["device"] == "cpu"
