"""What SECURITY.md promises of the source: nothing received is executed, nothing listens for others by itself."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    file for folder in ("treepo_async", "launch") for file in (ROOT / folder).rglob("*.py")
)

EXECUTES = (
    r"\b(import|from)\s+(pickle|cPickle|_pickle|dill|cloudpickle|marshal|shelve|joblib)\b",
    r"\bimport_module\(\s*[\"'](pickle|dill|cloudpickle|marshal|shelve|joblib)",
    r"\btorch\.load\(",
    r"\b(send|recv)_pyobj\(",
    r"\b\w*object_list\(",
    r"\ball_gather_object\(|\bgather_object\(",
    r"allow_pickle\s*=\s*True",
    r"\byaml\.(load|load_all|unsafe_load|full_load)\(",
    r"(?<![\w.])(eval|exec)\(",
    r"\bshell\s*=\s*True",
    r"\bos\.(system|popen)\(",
    r"\btrust_remote_code\s*=\s*True",
    r"--trust-remote-code",
)
"""Ways to run code that came as data."""
LISTENS = (r"0\.0\.0\.0", r"\btcp://\*", r"host\s*=\s*[\"']{2}")
"""Ways to listen on every interface."""


def found(patterns, text):
    return [
        f"{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if any(re.search(pattern, line) for pattern in patterns)
    ]


@pytest.mark.parametrize("patterns", [EXECUTES, LISTENS], ids=["executes", "listens"])
def test_the_source_has_no_way_to(patterns):
    lines = {str(file.relative_to(ROOT)): found(patterns, file.read_text()) for file in SOURCES}
    assert len(lines) > 150
    assert {name: hits for name, hits in lines.items() if hits} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "    from dill import loads",
        "state = torch.load(file)",
        "message = socket.recv_pyobj()",
        "dist.recv_object_list(header)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text)",
        "value = eval(text)",
        "subprocess.run(word, shell=True)",
    ],
)
def test_what_would_execute_data_is_recognised(line):
    assert found(EXECUTES, line)


@pytest.mark.parametrize("line", ["model.eval()", "cursor.executescript(x)", "yaml.safe_load(x)"])
def test_what_is_harmless_is_not(line):
    assert not found(EXECUTES, line)


def test_the_import_contract_forbids_what_unpickles():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in contracts["contracts"] if c["name"] == "nothing is unpickled")
    assert set(contract["source_modules"]) == {"treepo_async", "launch"}
    assert {"pickle", "dill", "cloudpickle", "marshal", "shelve"} <= set(
        contract["forbidden_modules"]
    )


@pytest.mark.parametrize(
    ("package", "least"),
    [("sglang", (0, 5, 23)), ("ray", (2, 60, 0)), ("torch", (2, 13)), ("msgspec", (0, 22))],
)
def test_dependencies_are_past_the_faults_that_are_known(package, least):
    """SECURITY.md says which; lowering a pin must be a decision."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = (d for d in project["dependencies"] if re.match(rf"{package}[=>]=", d))
    version = re.search(r"[=>]=([\d.]+)", pin)[1]
    assert tuple(map(int, version.split("."))) >= least
    assert f"{package} {'.'.join(map(str, least))}" in (ROOT / "SECURITY.md").read_text()


def test_every_listener_is_named_in_the_security_page():
    text = (ROOT / "SECURITY.md").read_text()
    for word in ("replay", "gate", "SGLang", "Ray", "torch.distributed", "cluster.host"):
        assert word in text, word
