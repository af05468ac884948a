"""`python launch/verify.py RUN [acks=FILE,FILE,...] [ignore=NAME,NAME,...]`: does the folder of a run keep its promises?

One line for each invariant, `ok` or `FAILED`, with the numbers that say so. RUN may be at work, stopped or ended; nothing in it is
changed. `acks` names files in which actors wrote down what they were told. A line that is named by `ignore` does not
decide the exit code, e.g. `ignore=results` after the learner's layout was changed.

Exit codes: 0 everything holds, 1 something does not, 2 a bad word or folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.run import EXIT_BAD_CONFIG, EXIT_FAILED
from treepo_async.cluster.verify import deliveries_in, verify_run
from treepo_async.errors import ConfigError, DataError

USAGE = "RUN [acks=FILE,FILE,...] [ignore=NAME,NAME,...]"


def main(words: list[str]) -> int:
    """Check, and print what was found. Gives the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        run, acks, ignored = _parse(words)
        verdicts = verify_run(run, acks=deliveries_in(acks))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    for verdict in verdicts:
        print(verdict.line())
    failed = [verdict.name for verdict in verdicts if not verdict.holds]
    which = f"; these do not: {', '.join(failed)}" if failed else ""
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} invariants hold{which}")
    return EXIT_FAILED if {*failed} - {*ignored} else 0


def _parse(words: list[str]) -> tuple[Path, list[Path], list[str]]:
    """The run, files of acknowledgements, and names that are ignored."""
    runs = [word for word in words if "=" not in word]
    keys = dict(word.split("=", 1) for word in words if "=" in word)
    if len(runs) != 1 or keys.keys() - {"acks", "ignore"}:
        raise ConfigError(f"give the folder of one run: {USAGE}")
    acks, ignored = (keys.get(key, "").split(",") for key in ("acks", "ignore"))
    return Path(runs[0]), [Path(name) for name in acks if name], ignored


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
