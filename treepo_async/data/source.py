"""Prompt streams: a growing index in, a tokenised prompt out.

Replay asks for prompt after prompt and stores only the next index, which is the whole resumable cursor. The
invariant: `prompt(index)` depends on nothing but the source, the seed and the index, and never gives a
question that `heldout` gives. Whoever does not train takes every record once, as it stands: `FileOrder`.
"""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treepo_async.config.schema import DataConfig
from treepo_async.data.records import Record, Records, Unusable, each_record, read_records
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.errors import DataError
from treepo_async.tiny.built_in import BUILT_INS, BuiltIn
from treepo_async.tiny.task import Problem
from treepo_async.types import Prompt

HELDOUT_ONE_IN = 20

_HELDOUT_SEED = 0
"""Held-out prompts are the same for every run, so that runs can be compared."""


class EndOfData(DataError):  # noqa: N818 - the orderly end of a stream, like StopIteration
    """Every epoch has been handed out."""


class PromptSource(Protocol):
    """A stream of training prompts and a fixed set of held-out ones.

    Attributes:
        num_skipped: records that could not be used.
        skipped: the first few reasons.
    """

    num_skipped: int
    skipped: list[str]

    def prompt(self, index: int) -> Prompt:
        """The training prompt at `index`, from 0, in any order of access.

        Raises:
            EndOfData: `index` lies past the last epoch.
            DataError: the prompt is longer than the limit; the next index may be fine.
        """
        ...

    def heldout(self, n: int) -> tuple[Prompt, ...]:
        """The first `n` held-out prompts, fewer where the source has fewer that fit the limit."""
        ...


def open_source(
    data: DataConfig, *, tokenizer: TextTokenizer, seed: int, max_prompt_tokens: int
) -> PromptSource:
    """Open the source that the data section names.

    Args:
        data: the section; a built-in task uses none of it but its path.
        tokenizer: of the model that is fed.
        seed: of the order of records, or of the problems of a built-in task.
        max_prompt_tokens: longer prompts raise; the section's own limit may be larger than the model allows.

    Raises:
        ConfigError: a source does not exist or has a form that is not read.
        DataError: no usable record, or none left to train on.
    """
    text = _PromptText(tokenizer, data.instruction, max_prompt_tokens)
    if data.path in BUILT_INS:
        return BuiltInSource(text, BUILT_INS[data.path], seed)
    fields = data.prompt_field, data.answer_field
    records = read_records(data.path, *fields)
    heldout = None if data.eval_path is None else read_records(data.eval_path, *fields)
    return RecordSource(records, heldout, text, seed=seed, epochs=data.epochs)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that gives no prompt."""

    id: str
    """What the id of its prompt would be."""
    reason: str


class FileOrder:
    """Every record of a source once, in its order: not shuffled, nothing held out.

    It can be gone through again and again, and reads as it goes. A built-in task gives its training problems in
    order, without end.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        tokenizer: TextTokenizer,
        seed: int,
        max_prompt_tokens: int,
        vocab_size: int,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            data: the section.
            tokenizer: of the model that is fed.
            seed: of the problems of a built-in task.
            max_prompt_tokens: records with longer prompts are skipped.
            vocab_size: of the model; records with other tokens are skipped.
        """
        self._data, self._seed, self._vocab_size = data, seed, vocab_size
        self._text = _PromptText(tokenizer, data.instruction, max_prompt_tokens)

    def __iter__(self) -> Iterator[Prompt | Skipped]:
        """All records.

        Raises:
            ConfigError: the source does not exist or has a form that is not read.
        """
        data = self._data
        if data.path in BUILT_INS:
            return self._problems(BUILT_INS[data.path])
        name, records = each_record(data.path, data.prompt_field, data.answer_field)
        return (self._prompt(name, record) for record in records)

    def _problems(self, built_in: BuiltIn) -> Iterator[Prompt | Skipped]:
        source = BuiltInSource(self._text, built_in, self._seed)
        for index in itertools.count():
            try:
                yield self._checked(source.prompt(index))
            except DataError as error:
                yield Skipped(source.prompt_id(index), str(error))

    def _prompt(self, name: str, record: Record | Unusable) -> Prompt | Skipped:
        prompt_id = f"{name}-{record.number}"
        if isinstance(record, Unusable):
            return Skipped(prompt_id, record.reason)
        try:
            return self._checked(self._text.instructed(prompt_id, record))
        except DataError as error:
            return Skipped(prompt_id, str(error))

    def _checked(self, prompt: Prompt) -> Prompt:
        if (largest := int(prompt.token_ids.max(initial=-1))) >= self._vocab_size:
            raise DataError(
                f"{prompt.id} has the token id {largest}, the model's vocabulary has {self._vocab_size}; the "
                "tokenizer is of another model"
            )
        return prompt


@dataclass(frozen=True, slots=True)
class _PromptText:
    """From question to prompt: instruction, chat template, tokens and their limit."""

    tokenizer: TextTokenizer
    instruction: str
    max_prompt_tokens: int

    def instructed(self, prompt_id: str, record: Record) -> Prompt:
        question = "\n".join(part for part in (record.question, self.instruction) if part)
        return self.bare(prompt_id, self.tokenizer.render(question), record.answer)

    def bare(self, prompt_id: str, text: str, answer: str) -> Prompt:
        token_ids = self.tokenizer.encode(text)
        if len(token_ids) > self.max_prompt_tokens:
            raise DataError(
                f"{prompt_id} has {len(token_ids)} prompt tokens, more than the {self.max_prompt_tokens} "
                "that data.max_prompt_tokens and the model's context allow; shorten the record"
            )
        return Prompt(prompt_id, token_ids, text, answer)


class BuiltInSource:
    """A built-in task: no end, no records, and a held-out split by construction."""

    def __init__(self, text: _PromptText, built_in: BuiltIn, seed: int) -> None:
        self._text = text
        self._name, self._task = built_in.name, built_in.task
        self._seed = seed
        self.num_skipped = 0
        self.skipped: list[str] = []

    def prompt(self, index: int) -> Prompt:
        """The training problem at `index`; see `PromptSource.prompt`."""
        problem = self._task.problem(self._seed, index, heldout=False)
        return self._prompt(self.prompt_id(index), problem)

    def prompt_id(self, index: int) -> str:
        """What the prompt at `index` is called."""
        return f"{self._name}-train-{index}"

    def heldout(self, n: int) -> tuple[Prompt, ...]:
        """The first `n` held-out problems."""
        problems = [self._task.problem(_HELDOUT_SEED, index, heldout=True) for index in range(n)]
        return tuple(
            self._prompt(f"{self._name}-heldout-{index}", problem)
            for index, problem in enumerate(problems)
        )

    def _prompt(self, prompt_id: str, problem: Problem) -> Prompt:
        return self._text.bare(prompt_id, problem.question + "\n", problem.answer)


class RecordSource:
    """Records in memory, shuffled anew in every epoch.

    Args:
        records: what to train on, and to hold out from where `heldout` is None.
        heldout: records to evaluate on; their questions are left out of training.
        text: how a question becomes a prompt.
        seed: of the shuffles.
        epochs: passes over the data, None for no end.

    Raises:
        DataError: no record is left to train on.
    """

    def __init__(
        self,
        records: Records,
        heldout: Records | None,
        text: _PromptText,
        *,
        seed: int,
        epochs: int | None,
    ) -> None:
        self._name = records.name
        self._heldout_name = records.name if heldout is None else heldout.name
        self._training, self._heldout = _split(records, heldout)
        if not self._training:
            raise DataError(
                f"{records.name} has no record left to train on: all {len(records.records)} are held "
                "out; give more records, or a data.eval_path that does not contain them"
            )
        self._text = text
        self._seed = seed
        self._epochs = epochs
        self._order = lru_cache(maxsize=2)(self._shuffled)
        self.num_skipped = records.num_skipped + (heldout.num_skipped if heldout else 0)
        self.skipped = [*records.skipped, *(heldout.skipped if heldout else ())]

    def prompt(self, index: int) -> Prompt:
        """The training prompt at `index`; see `PromptSource.prompt`."""
        epoch, position = divmod(index, len(self._training))
        if self._epochs is not None and epoch >= self._epochs:
            raise EndOfData(
                f"{self._name} ended: {self._epochs} epochs of {len(self._training)} records are "
                "handed out; raise data.epochs to go on"
            )
        record = self._training[self._order(epoch)[position]]
        return self._text.instructed(f"{self._name}-{record.number}", record)

    def heldout(self, n: int) -> tuple[Prompt, ...]:
        """The first `n` held-out prompts, those longer than the limit left out."""
        prompts: list[Prompt] = []
        for record in self._heldout:
            if len(prompts) >= n:
                break
            try:
                prompts.append(
                    self._text.instructed(f"{self._heldout_name}-{record.number}", record)
                )
            except DataError:
                continue
        return tuple(prompts)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._training))


def _split(
    records: Records, heldout: Records | None
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Training and held-out records; no question is in both."""
    if heldout is not None:
        questions = {record.question for record in heldout.records}
        held = heldout.records
    else:
        held = tuple(r for r in records.records if _is_heldout(r.question))
        questions = {record.question for record in held}
    training = tuple(r for r in records.records if r.question not in questions)
    order = np.random.default_rng(_HELDOUT_SEED).permutation(len(held))
    return training, tuple(held[i] for i in order)


def _is_heldout(question: str) -> bool:
    return zlib.crc32(question.encode(errors="surrogatepass")) % HELDOUT_ONE_IN == 0
