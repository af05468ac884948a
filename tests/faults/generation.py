"""`python -m tests.faults.generation data=FILE [kills=3] [out=DIR] [key=value ...]`: kill the stand-alone actor on its way through a file.

    start -> 1/4 of the prompts have ended -> kill -9, engine and all -> the same command again -> 1/2 -> kill -> ... -> the end

Exit code 0: every record of FILE (lines of JSON) has ended exactly once, with a tree or with a reason why there is none;
every line parses; and lines that stood there before a kill stand there unchanged. The model is the tiny one with
`POSITIONS` positions, as a longer prompt than its 512 leave room for is skipped; trees are small. Other words go to
`launch/actor.py`, e.g. `limit=100`, or `model` and `engine.url` to use another engine. Waits: as `job` does.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.audit import Audit, audit
from tests.faults.job import ROOT, RUN_S, Job, JobError
from treepo_async.cluster.prepare import prepare_model
from treepo_async.config.schema import GenerateConfig
from treepo_async.tiny.tokenizer import save_tokenizer

POSITIONS = 1024
SMALL: Mapping[str, str] = {"tree.width": "4", "tree.segment_tokens": "8", "tree.max_depth": "2"}
PROMPT_S = 1.0
"""Each may take so long, in the mean."""
MAX_TOLD = 10


@dataclass
class Survival:
    """What a job with kills came to."""

    num_prompts: int
    killed_at: list[int] = field(default_factory=list)
    """Prompts that had ended at each kill."""
    start_s: list[float] = field(default_factory=list)
    """From each start to the first prompt that ended in it."""
    seconds: float = 0.0
    """Of all starts together."""
    audit: Audit | None = None
    wrong: list[str] = field(default_factory=list)
    """What is wrong beside what the audit found."""

    @property
    def holds(self) -> bool:
        """Whether nothing was lost, doubled or damaged."""
        return self.audit is not None and not (self.wrong or self.audit.wrong)

    def __str__(self) -> str:
        rows = [("prompts", str(self.num_prompts))]
        if self.audit is not None:
            rows += [
                ("trees", str(self.audit.num_trees)),
                ("skipped", str(self.audit.endings["skipped"])),
                ("failed", str(self.audit.endings["failed"])),
            ]
        killed_at = ", ".join(map(str, self.killed_at)) or "-"
        rows += [
            ("kills", f"{len(self.killed_at)}, after {killed_at} prompts"),
            ("seconds", f"{self.seconds:.1f}, {sum(self.start_s):.1f} of them before the first prompt of a start"),
        ]  # fmt: skip
        wrong = [*self.wrong, *(self.audit.wrong if self.audit else [])]
        rows += [("WRONG", text) for text in wrong[:MAX_TOLD]]
        if len(wrong) > MAX_TOLD:
            rows.append(("WRONG", f"and {len(wrong) - MAX_TOLD} more"))
        return "\n".join(f"{name:<10} {text}" for name, text in rows)


def survive(
    job: Job,
    prompt_ids: Sequence[str],
    *,
    kills: int,
    vocab_size: int,
    say: Callable[[str], None] = lambda _: None,
) -> Survival:
    """Kill a job so many times at even distances, let it end, and see what is there.

    Args:
        job: not started yet.
        prompt_ids: of all its prompts.
        kills: after i / (kills + 1) of the prompts, for i from 1.
        vocab_size: of its model.
        say: told of each kill.
    """
    found, began, kept = Survival(len(prompt_ids)), time.monotonic(), list[bytes]()
    try:
        for number in range(1, kills + 1):
            _begin(job, found)
            kept.append(_kill_after(job, found, len(prompt_ids) * number // (kills + 1)))
            say(f"kill {number} after {found.killed_at[-1]} of {len(prompt_ids)} prompts")
        _begin(job, found)
        code, text = job.end(timeout_s=max(RUN_S, len(prompt_ids) * PROMPT_S))
        if code != 0:
            found.wrong.append(f"the last start ended with {code}: {text}")
    except JobError as error:
        found.wrong.append(str(error))
    finally:
        job.close()
    found.seconds = time.monotonic() - began
    lines = job.out.read_bytes() if job.out.exists() else b""
    for number, before in enumerate(kept, start=1):
        if not lines.startswith(before):
            found.wrong.append(f"lines from before kill {number} are not what they were")
    found.audit = audit(job.out, prompt_ids, vocab_size=vocab_size)
    return found


def _begin(job: Job, found: Survival) -> None:
    """Start the job, and wait until it gets on."""
    began, number = time.monotonic(), job.num_ended()
    job.start().wait_for(number + 1)
    found.start_s.append(time.monotonic() - began)


def _kill_after(job: Job, found: Survival, number: int) -> bytes:
    """Kill the job once so many prompts have ended. Gives the lines of trees that are whole then."""
    job.wait_for(number)
    job.crash()
    job.wait_until_gone()
    found.killed_at.append(job.num_ended())
    if found.killed_at[-1] >= found.num_prompts:
        raise JobError("the kill came after the last prompt; give more records, or fewer kills")
    lines = job.out.read_bytes()
    return lines[: lines.rfind(b"\n") + 1]


def ids_of(data: Path) -> list[str]:
    """What the records of a file are called: by its name, and their number from 1."""
    with data.open("rb") as file:
        return [
            f"{data.stem}-{number}" for number, line in enumerate(file, start=1) if line.strip()
        ]


def long_model(folder: Path) -> Path:
    """The tiny model with `POSITIONS` positions; its weights do not depend on how many there are."""
    cache_dir, tiny = ROOT / GenerateConfig().cache_dir, GenerateConfig().model.path
    made = prepare_model(tiny, cache_dir=cache_dir, seed=0, report=lambda *_: None)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = POSITIONS
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder, POSITIONS)
    return folder


def main(words: Sequence[str]) -> int:
    """Do it as the words say. Gives the exit code."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if len(given) < len(words) or "data" not in given:
        _say(str(__doc__))
        return 2
    kills, data = int(given.pop("kills", "3")), Path(given.pop("data")).resolve()
    folder = Path(given.pop("out", "") or tempfile.mkdtemp(prefix="generation-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "trees.jsonl"
    if out.exists():
        _say(f"{out} is there already; name another out")
        return 2
    model = Path(given.pop("model", "") or long_model(folder / "model")).resolve()
    settings = {**SMALL, **given, "model": str(model), "data": str(data)}
    ids = ids_of(data)[: int(given["limit"]) if "limit" in given else None]
    found = survive(
        Job(out, [f"{key}={value}" for key, value in settings.items()]),
        ids,
        kills=kills,
        vocab_size=json.loads((model / "config.json").read_text())["vocab_size"],
        say=_say,
    )
    verdict = "passed" if found.holds else "FAILED"
    _say(f"\ngeneration from {data}: {verdict}\n{found}\nfolder     {folder}")
    return 0 if found.holds else 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
