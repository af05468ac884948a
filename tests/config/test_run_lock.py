import os

import pytest

from treepo_async.config.run_lock import held
from treepo_async.errors import ConfigError


def test_two_drivers_cannot_hold_one_folder(tmp_path):
    folder = tmp_path / "run"
    with held(folder):
        assert folder.is_dir()
        with pytest.raises(ConfigError, match="in use by another driver") as caught, held(folder):
            pass
    # whoever holds it is named, so that a person can look for it
    assert f"(pid {os.getpid()}: " in str(caught.value)
    assert "pytest" in str(caught.value)
    with held(folder):
        pass
