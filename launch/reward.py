r"""`python launch/reward.py [reward.scorer=NAME] [data=FILE] [n=5] [key=value ...]`: try a scorer on n records.

Of each record it scores the answer key itself in \boxed{}, which should be right, another answer, which should be
wrong, and an empty response. `responses=FILE.jsonl [n=ALL]` scores lines of {"response": ..., "answer": ...} instead.
Scores come from processes as an actor has them. With reward.overlong_tokens, tokens are counted with the tokenizer
of model=FOLDER.

Exit codes: 0 every response has a score, 1 a reward error, 2 a bad key, value or file, 130 stopped by Ctrl-C.
"""

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from treepo_async.config.command_line import parse
from treepo_async.config.limits import response_limit
from treepo_async.config.schema import Config, DataConfig
from treepo_async.data.records import Record, each_record
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.errors import ConfigError, DataError
from treepo_async.scoring.async_scorer import open_scorer
from treepo_async.scoring.exact import final_answer, normalised, number
from treepo_async.scoring.failures import Attempt, counts_text
from treepo_async.scoring.reward import RewardRules, rewards
from treepo_async.tiny.built_in import BUILT_INS
from treepo_async.tiny.tokenizer import build_tokenizer

EXIT_FAILED, EXIT_BAD_USE, EXIT_STOPPED = 1, 2, 130
DEFAULT_N = 5
COLUMNS = (("question", 26), ("response", 30), ("answer key", 14), ("score", 7), ("reward", 7))
"""Of the table, with their widths; time and error follow."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response to score."""

    question: str
    response: str
    answer: str
    kind: str = "given"
    """What it is by construction: own (right), wrong, empty, or given by a file."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A sample and what became of it."""

    sample: Sample
    attempt: Attempt
    reward: float
    seconds: float


def main(words: list[str]) -> int:
    """Try, and print the table and the verdict. Gives the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        config, n, responses = _parse(words)
        samples = list(_samples(config, n, responses))
        trials = asyncio.run(_try(config, samples))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_USE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_STOPPED
    print(verdict(trials))
    return EXIT_FAILED if any(trial.attempt.failure for trial in trials) else 0


def samples_of(records: Iterable[tuple[str, str]]) -> Iterator[Sample]:
    """Three responses to each question and answer key: the key, another answer, nothing."""
    for question, answer in records:
        own = final_answer(answer) or answer
        yield Sample(question, rf"\boxed{{{own}}}", answer, "own")
        yield Sample(question, rf"\boxed{{{other_than(own)}}}", answer, "wrong")
        yield Sample(question, "", answer, "empty")


def other_than(answer: str) -> str:
    """An answer that is not equal to this one."""
    value = number(normalised(answer))
    return f"{answer}+1" if value is None else str(value + 1)


def verdict(trials: Sequence[Trial]) -> str:
    """One line."""
    counts = Counter(t.attempt.failure for t in trials if t.attempt.failure is not None)
    errors = f"errors: {counts_text(counts)}"
    if any(trial.sample.kind == "given" for trial in trials):
        return f"right: {_share(trials, 'given', 1)}, wrong: {_share(trials, 'given', 0)}, {errors}"
    right, wrong = _share(trials, "own", 1), _share(trials, "wrong", 0)
    return f"own answers right: {right}, wrong answers wrong: {wrong}, {errors}"


def row(trial: Trial) -> str:
    """A line of the table."""
    sample, attempt = trial.sample, trial.attempt
    texts = (
        sample.question,
        sample.response,
        sample.answer,
        *map(_number, (attempt.accuracy, trial.reward)),
    )
    cells = [
        f"{_short(text, width):<{width}}" for text, (_, width) in zip(texts, COLUMNS, strict=True)
    ]
    last_line = attempt.detail.strip().rpartition("\n")[2]
    error = "" if attempt.failure is None else f"{attempt.failure}: {_short(last_line, 60)}"
    return f"{' '.join(cells)} {trial.seconds * 1000:>6.0f}ms  {error}".rstrip()


def _parse(words: Sequence[str]) -> tuple[Config, int | None, Path | None]:
    """The config of a run, n and responses."""
    own: dict[str, str] = {}
    others = []
    for word in words:
        key, _, value = word.partition("=")
        if key in ("n", "responses"):
            own[key] = value
        else:
            others.append(word)
    n = own.get("n")
    if n is not None and not (n.isdecimal() and int(n) > 0):
        raise ConfigError(f"n={n} must be a whole number above 0")
    responses = Path(own["responses"]) if "responses" in own else None
    return parse(others), None if n is None else int(n), responses


def _samples(config: Config, n: int | None, responses: Path | None) -> Iterator[Sample]:
    if responses is not None:
        return itertools.islice(_given(responses), n)
    return samples_of(itertools.islice(_records(config.data, config.seed), n or DEFAULT_N))


def _records(data: DataConfig, seed: int) -> Iterator[tuple[str, str]]:
    """Questions and answer keys."""
    if data.path in BUILT_INS:
        for index in itertools.count():
            problem = BUILT_INS[data.path].task.problem(seed, index, heldout=False)
            yield problem.question, problem.answer
    reason = f"{data.path} is empty"
    found = False
    for record in each_record(data.path, data.prompt_field, data.answer_field)[1]:
        if isinstance(record, Record):
            found = True
            yield record.question, record.answer
        else:
            reason = f"{data.path} record {record.number}: {record.reason}"
            print(f"skipped: {reason}", file=sys.stderr)
    if not found:
        raise DataError(f"no usable record: {reason}")


def _given(file: Path) -> Iterator[Sample]:
    if not file.is_file():
        raise ConfigError(f"responses={file} does not exist; check the path")
    # by line feeds alone: a text may hold what Python takes for the end of a line besides
    lines = [
        (index, line)
        for index, line in enumerate(_bytes_of(file).split(b"\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise DataError(
            f'responses={file} is empty; write a line of {{"response": ..., "answer": ...}} for each'
        )
    for index, line in lines:
        try:
            fields = json.loads(line.decode())
            response, answer = fields["response"], fields["answer"]
        except UnicodeDecodeError as error:
            raise DataError(
                f"responses={file} line {index} is not UTF-8 ({error.reason} at byte {error.start}); write it again"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'responses={file} line {index} is not {{"response": ..., "answer": ...}}: {error!r}'
            ) from error
        yield Sample(str(fields.get("question", "")), str(response), str(answer))


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"responses={file} cannot be read: {error.strerror}") from error


async def _try(config: Config, samples: Sequence[Sample]) -> list[Trial]:
    """Score one after the other, and print each row as it comes."""
    reward = config.reward
    rules, count = RewardRules.of(reward, response_limit(config)), _token_counter(config)
    trials = []
    async with open_scorer(
        reward.scorer, workers=reward.workers, timeout_s=reward.timeout_s
    ) as scorer:
        print(
            " ".join(f"{name:<{width}}" for name, width in COLUMNS) + "     time  error", flush=True
        )
        for sample in samples:
            began = time.monotonic()
            attempt = await scorer.attempt(sample.response, sample.answer)
            seconds = time.monotonic() - began
            accuracies_L = np.array([attempt.accuracy], np.float32)
            num_tokens_L = np.array([count(sample.response)])
            (value,) = rewards(accuracies_L, num_tokens_L, rules)
            trials.append(Trial(sample, attempt, float(value), seconds))
            print(row(trials[-1]), flush=True)
    return trials


def _token_counter(config: Config) -> Callable[[str], int]:
    """Tokens of a response, where the reward depends on them."""
    if config.reward.overlong_tokens == 0:
        return lambda _: 0
    if config.model.path in BUILT_INS:
        tokenizer = build_tokenizer()
        return lambda text: len(tokenizer.encode(text).ids)
    if not Path(config.model.path).is_dir():
        raise ConfigError(
            f"reward.overlong_tokens counts tokens, and model.path={config.model.path} is no folder with a tokenizer"
        )
    loaded = TextTokenizer.load(Path(config.model.path))
    return lambda text: len(loaded.encode(text))


def _share(trials: Sequence[Trial], kind: str, accuracy: float) -> str:
    scores = [trial.attempt.accuracy for trial in trials if trial.sample.kind == kind]
    return f"{scores.count(accuracy)}/{len(scores)}"


def _short(text: str, width: int) -> str:
    """Text on one line, cut to a width."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
