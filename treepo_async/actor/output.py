"""What a stand-alone actor writes: trees, prompts that ended without one, and the job that they belong to.

    OUT                     the trees; a table (.parquet) appears at the end, by one rename
    OUT.unfinished.jsonl    a table's lines until then
    OUT.failed.jsonl        prompts without a tree, with the reason
    OUT.job.json            what decides which trees belong here
    OUT.sglang.log          what the server says that the actor starts
    .OUT.lock               who holds it writes; it stays

Invariant: after any crash every prompt is in at most one of the first two and the third, and what is there is whole.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from treepo_async.actor.endings import Ending, Endings, Outcome
from treepo_async.actor.job import Job
from treepo_async.actor.journal import Journal
from treepo_async.errors import ConfigError, DataError, WireError
from treepo_async.types import Tree
from treepo_async.wire.forms import FORMS, Form, fields_of_line
from treepo_async.wire.tables import read_lines, write_table
from treepo_async.wire.tree_line import Decode
from treepo_async.wire.whole_file import whole_file


class Output:
    """The files of one job, open for more. Use `held` around it."""

    def __init__(
        self, out: Path, job: Job, decode: Decode, *, overwrite: bool, retry_failed: bool
    ) -> None:
        """Go on where the files stand, or make them.

        Args:
            out: `.jsonl` or `.parquet`; decides the names of all files.
            job: of which the trees will be.
            decode: tokens to text.
            overwrite: begin anew, whatever job's trees are there.
            retry_failed: forget which prompts failed.

        Raises:
            ConfigError: the files hold something else.
            DataError: they are damaged.
        """
        self.out = out
        self._decode = decode
        self._form = FORMS[job.keys["out_form"]]
        self._is_table = out.suffix == ".parquet"
        self._lines = beside(out, "unfinished.jsonl") if self._is_table else out
        self._job_file = beside(out, "job.json")
        if overwrite:
            self._check_ours()
            self._remove()
        self.job = self._settle_job(job)
        self._has_news = not (self._is_table and out.exists() and not self._lines.exists())
        """Whether the table is not what its lines would give."""
        if not self._has_news:
            self._restore_lines()
        self._journal = Journal(self._lines)
        failed = beside(out, "failed.jsonl")
        self.endings = Endings(failed, done=self.done, retry_failed=retry_failed)

    @property
    def done(self) -> set[str]:
        """Prompts that have a tree."""
        return self._journal.prompt_ids

    def has_ended(self, prompt_id: str) -> bool:
        """Whether nothing is to be done for a prompt."""
        return prompt_id in self.done or prompt_id in self.endings.by_id

    def newest(self) -> Path:
        """The file that has the trees now."""
        return self._lines if self._lines.exists() else self.out

    def append(self, tree: Tree) -> None:
        """A prompt has its tree."""
        self._has_news = True
        self._journal.append(tree.prompt.id, self._form.encode(tree, self._decode))

    def end(self, prompt_id: str, outcome: Outcome, reason: str) -> None:
        """A prompt will have no tree."""
        self.endings.add(Ending(prompt_id, outcome, reason))

    def sync(self) -> None:
        """Return once all trees and endings are on disk."""
        self._journal.sync()
        self.endings.sync()

    def settle_weights(self, weights: str) -> None:
        """Write down which weights sample the trees.

        Raises:
            ConfigError: those that are there were sampled by others.
        """
        self.job = self._settle_job(replace(self.job, weights=weights))

    def close(self) -> None:
        """Leave it to be gone on with."""
        self.endings.sync()
        self._journal.close()

    def finish(self) -> None:
        """Make the table, where one is wanted, of all trees that are there."""
        self.sync()
        if self._is_table:
            if self._has_news:
                write_table(self._lines, self.out, self._form)
            self._lines.unlink()

    def _settle_job(self, job: Job) -> Job:
        """Write the job, unless its files are there; they must then be of the same one."""
        if self._job_file.exists():
            earlier = self._read_job()
            if found := list(job.differences(earlier)):
                raise ConfigError(
                    f"out={self.out} holds another job: {'; '.join(found)}; give what it had, name another "
                    "out, or give overwrite=true"
                )
            job = replace(job, weights=job.weights or earlier.weights)
        elif self.out.exists() or self._lines.exists():
            raise ConfigError(
                f"out={self.out} exists and {self._job_file.name} is not beside it, so nobody knows what it "
                "holds; name another out, or give overwrite=true if it holds trees"
            )
        with whole_file(self._job_file) as file:
            file.write(job.to_json().encode())
        return job

    def _read_job(self) -> Job:
        try:
            return Job.parse(self._job_file.read_text())
        except (DataError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self._job_file} cannot be used: {error}; name another out, or give overwrite=true"
            ) from error

    def _restore_lines(self) -> None:
        """A finished table is gone on with: back to lines."""
        with whole_file(self._lines) as file:
            file.writelines(line + b"\n" for line in read_lines(self.out, self._form))

    def _check_ours(self) -> None:
        """Raise ConfigError for a file that would be lost and is no output."""
        for file in (self.out, self._lines):
            if file.exists() and not self._job_file.exists() and not _holds_trees(file):
                raise ConfigError(
                    f"out={self.out}: {file} holds no trees and {self._job_file.name} is not beside it, so "
                    "overwrite=true leaves it alone; remove it, or name another out"
                )

    def _remove(self) -> None:
        # the job last: without it nobody would know what the others hold
        for file in (self.out, self._lines, beside(self.out, "failed.jsonl"), self._job_file):
            file.unlink(missing_ok=True)


def beside(out: Path, name: str) -> Path:
    """A file that belongs to an output."""
    return out.with_name(f"{out.name}.{name}")


def check_apart(out: Path, data: str) -> None:
    """Raise ConfigError if the data is one of the files of an output, by whatever path; opens neither."""
    names = ("unfinished.jsonl", "failed.jsonl", "job.json", "sglang.log")
    source = Path(data).expanduser()
    for file in (out, *(beside(out, name) for name in names)):
        is_same = file.exists() and source.exists() and file.samefile(source)
        if is_same or file.resolve() == source.resolve():
            raise ConfigError(f"data={data} is {file}, which out={out} writes; name another out")


def _holds_trees(file: Path) -> bool:
    """Whether the first entry of a file is a tree or a trajectory, or there is none."""
    return any(_begins_with(file, form) for form in FORMS.values())


def _begins_with(file: Path, form: Form) -> bool:
    try:
        if file.suffix == ".parquet":
            next(read_lines(file, form), None)
            return True
        with file.open("rb") as lines:
            first = lines.readline()
        if first:
            fields_of_line(first, form)
    except (DataError, WireError):
        return False
    return True


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep every other actor off an output.

    Raises:
        ConfigError: another one writes it, its folder does not exist, or it is no file.
    """
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.parent}; make it first")
    if out.exists() and not out.is_file():
        raise ConfigError(f"out={out} is there and is no file; name another one")
    # never removed: whoever made a new one could not see that the old one is held
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"out={out} is being written by another actor; wait for its end, or name another file"
            ) from error
        yield
