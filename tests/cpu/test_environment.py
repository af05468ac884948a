import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from treepo_async.cpu import environment as cpu

BARE_PYTHON = Path(sys.base_prefix) / "bin" / "python3"  # sees no installed packages


def run_python(code, tmp_path, extra_path=(), python=sys.executable):
    """Run code in a fresh interpreter, as SGLang's processes are; return its output."""
    path = os.pathsep.join(map(str, extra_path))
    added = cpu.environment(False, inherited={"PYTHONPATH": path})
    done = subprocess.run(
        [python, "-c", code],
        env={"PATH": os.environ["PATH"], **added},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_is_added_where_cuda_is_present():
    assert cpu.environment(True) == {}
    assert cpu.server_command(True)[1:] == ["-m", "sglang.launch_server"]


def test_cuda_gets_the_offline_switches_when_they_are_asked_for():
    assert cpu.environment(True, offline=True) == {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    assert "HF_HUB_OFFLINE" not in cpu.environment(False)


def test_without_cuda_the_engine_switch_and_the_site_folder_are_added():
    added = cpu.environment(False, inherited={})

    assert added["SGLANG_USE_CPU_ENGINE"] == "1"
    assert added["PYTHONPATH"] == str(cpu.SITE)
    assert added["OMP_NUM_THREADS"] == "1"
    assert cpu.server_command(False)[1:] == ["-m", "forked_sglang"]


def test_what_the_user_set_is_kept():
    inherited = {
        "PYTHONPATH": "/a:/b",
        "OMP_NUM_THREADS": "8",
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "mine",
    }

    added = cpu.environment(False, inherited=inherited)

    assert added["PYTHONPATH"] == f"{cpu.SITE}:/a:/b"
    assert added["OMP_NUM_THREADS"] == "8"
    assert added["SGLANG_EXTERNAL_MODEL_PACKAGE"] == "mine"


def test_applying_it_twice_adds_the_folder_once_and_never_the_working_directory():
    once = cpu.environment(False, inherited={"PYTHONPATH": ":/a:"})

    assert cpu.environment(False, inherited=once) == once
    assert once["PYTHONPATH"] == f"{cpu.SITE}:/a"


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_hidden_devices_count_as_absent(monkeypatch, hidden):
    monkeypatch.setattr(cpu, "_NVIDIA_DEVICE", Path("/dev/null"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cpu.cuda_present()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)

    assert not cpu.cuda_present()


def test_an_nvidia_tool_on_the_path_counts_as_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_NVIDIA_DEVICE", tmp_path / "absent")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not cpu.cuda_present()

    (tmp_path / "nvidia-smi").touch(mode=0o755)

    assert cpu.cuda_present()


def test_the_start_up_hook_imports_neither_torch_nor_torchvision(tmp_path):
    out = run_python("import sys; print({'torch', 'torchvision'} & set(sys.modules))", tmp_path)

    assert out == "set()"


def test_the_hook_reaches_a_spawned_child(tmp_path):
    (tmp_path / "spawning.py").write_text(
        "import multiprocessing, sys\n"
        "def child(): print('sgl_kernel stands in:', __import__('sgl_kernel').__version__)\n"
        "if __name__ == '__main__':\n"
        "    p = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    p.start(); p.join(); sys.exit(p.exitcode)\n"
    )
    out = run_python("import runpy; runpy.run_path('spawning.py', run_name='__main__')", tmp_path)

    assert out == "sgl_kernel stands in: 0.0.0"


def test_a_sitecustomize_further_down_the_path_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.was_run = 1")

    assert run_python("print(was_run)", tmp_path, extra_path=[tmp_path]) == "1"


IMPORT_AS_SGLANG_DOES = """
import sglang.srt.configs as configs
from transformers.utils import is_torchvision_available
print(is_torchvision_available())
try:
    print(configs.Mode.BICUBIC)
except ImportError as error:
    print(error)
"""


def write_package(folder, name, text):
    """Write a module and the packages above it."""
    path = folder.joinpath(*name.split("."))
    path.mkdir(parents=True)
    for above in [path, *path.parents]:
        if above == folder:
            break
        (above / "__init__.py").touch()
    (path / "__init__.py").write_text(text)


@pytest.fixture
def sglang_fakes(tmp_path):
    """Packages that import torchvision, and ask for it, in the ways the real ones do."""
    write_package(
        tmp_path,
        "sglang.srt.configs",
        "import torchvision.transforms as T\n"
        "from torchvision.transforms import functional\n"
        "from torchvision.transforms.functional import InterpolationMode as Mode\n",
    )
    write_package(
        tmp_path,
        "transformers.utils",
        "from functools import lru_cache\nfrom importlib.util import find_spec\n"
        "@lru_cache\ndef is_torchvision_available(): return find_spec('torchvision') is not None\n",
    )
    return tmp_path


def test_an_absent_torchvision_can_be_imported_by_sglang_and_stays_absent(sglang_fakes):
    out = run_python(IMPORT_AS_SGLANG_DOES, sglang_fakes, [sglang_fakes], BARE_PYTHON)

    assert out.splitlines() == ["False", "BICUBIC: torchvision is not installed"]


def test_an_installed_torchvision_is_left_alone(sglang_fakes):
    real = "class InterpolationMode: BICUBIC = 'the real one'"
    write_package(sglang_fakes, "torchvision.transforms.functional", real)

    out = run_python(IMPORT_AS_SGLANG_DOES, sglang_fakes, [sglang_fakes], BARE_PYTHON)

    assert out.splitlines() == ["True", "the real one"]


@pytest.mark.engine
def test_the_real_server_can_be_imported(tmp_path):
    code = "import sglang.srt.entrypoints.http_server as s, sys; print('torchvision.ops' in sys.modules)"

    assert run_python(code, tmp_path).splitlines()[-1] == "False"


def load_kernels():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("sgl_kernel", cpu.SITE / "sgl_kernel" / "__init__.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_new_cache_slots_land_in_the_rows_of_their_requests():
    torch = pytest.importorskip("torch")
    table = torch.zeros(3, 6, dtype=torch.int32)
    rows, start, end = torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([4, 2])
    slots = torch.tensor([11, 12, 13, 21, 22], dtype=torch.int64)

    load_kernels().assign_req_to_token_pool_cpu(rows, table, start, end, slots, 6)

    expected = [[21, 22, 0, 0, 0, 0], [0] * 6, [0, 11, 12, 13, 0, 0]]
    np.testing.assert_array_equal(table.numpy(), expected)


def test_any_other_kernel_can_be_imported_and_names_itself_when_called():
    kernel = load_kernels().some_fused_kernel

    with pytest.raises(RuntimeError, match=r"sgl_kernel\.some_fused_kernel"):
        kernel(1, 2)
