"""`python launch/actor.py data=IN out=OUT [model=PATH] [key=value ...]`: trees of all prompts of a file, without training.

`python launch/actor.py join=RUN_DIR [actors=N]`: N more actors of a training run, for as long as both last.
`--help` lists every key. The same command again goes on where it stopped, however it stopped. Nothing heavy is imported
before the command line has been checked.
"""

import asyncio
import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.run import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_STOPPED, progress_bar
from treepo_async.config.command_line import describe_generation, parse_generation
from treepo_async.config.limits import check_engine_tp
from treepo_async.config.schema import GenerateConfig
from treepo_async.errors import ConfigError, DataError, RoleError, TreepoError

if TYPE_CHECKING:
    from treepo_async.actor.standalone import Standalone

JOIN = "join="
JOIN_HELP = """
  join=RUN_DIR                 instead of all the above: be actors of a training run that goes on, until it ends or
                               Ctrl-C; with actors=N so many (default 1)"""
MAX_GUESTS = 256


def main(words: list[str]) -> int:
    """Generate, and say how it ended. Gives the exit code."""
    if "--help" in words or "-h" in words:
        print(describe_generation())
        print(JOIN_HELP)
        return 0
    _open_closed_streams()
    # also where a shell started this in the background, and so had it ignore Ctrl-C
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        if any(word.startswith(JOIN) for word in words):
            return join(words)
        return generate(parse_generation(words), words)
    except (ConfigError, DataError, OSError) as error:
        _complain(f"error: {_reason(error)}")
        return EXIT_BAD_CONFIG
    except KeyboardInterrupt:
        _complain("stopped before the first tree")
        return EXIT_STOPPED


def join(words: list[str]) -> int:
    """Be actors of a run that goes on elsewhere. Gives the exit code: 0 after Ctrl-C, and when the run ends."""
    from treepo_async.cluster.join import Guests, accept, guests
    from treepo_async.cluster.ray_cluster import make_importable

    run_dir, number = _parse_join(words)
    invitation = accept(run_dir)
    make_importable()
    party = Guests(
        run_dir, invitation, guests(invitation, number), lambda line: print(line, flush=True)
    )
    try:
        print(party.run())
    except KeyboardInterrupt:
        print("left; their leases went back to the run")
    except RoleError as error:
        _complain(f"error: {error}\n{error.tail}")
        return EXIT_FAILED
    return 0


def _parse_join(words: list[str]) -> tuple[Path, int]:
    found = dict(word.partition("=")[::2] for word in words)
    other = sorted(found.keys() - {"join", "actors"})
    if other:
        raise ConfigError(
            f"{other[0]} does not go with join=: guests work by the config of the run; give join=RUN_DIR [actors=N]"
        )
    number = found.get("actors", "1")
    if not number.isdigit() or not 1 <= int(number) <= MAX_GUESTS:
        raise ConfigError(f"actors={number} must be a number from 1 to {MAX_GUESTS}")
    return Path(found["join"]), int(number)


def generate(config: GenerateConfig, words: list[str]) -> int:
    """Prepare model, data and files, then grow what is not there yet. Gives the exit code."""
    from treepo_async.actor.output import Output, check_apart, held
    from treepo_async.actor.printer import LogLines, Printer
    from treepo_async.actor.standalone import Inputs, Standalone
    from treepo_async.cluster.prepare import load_model_config, prepare_model
    from treepo_async.cpu.environment import cuda_present

    if config.engine.url is None:
        check_engine_tp(config.engine.tp, on_gpus=cuda_present())
    out = Path(config.out or "")
    check_apart(out, config.data.path)
    printer = Printer(sys.stdout)
    logging.basicConfig(handlers=[LogLines(printer)], format="%(message)s")
    with progress_bar("warm start of the tiny model") as report:
        model_dir = prepare_model(
            config.model.path, cache_dir=Path(config.cache_dir), seed=config.seed, report=report
        )
    inputs = Inputs.of(config, model_dir, load_model_config(model_dir))
    with held(out):
        output = Output(
            out,
            inputs.job,
            inputs.tokenizer.decode,
            overwrite=config.overwrite,
            retry_failed=config.retry_failed,
        )
        try:
            return carry_out(Standalone(inputs, output, printer), words)
        finally:
            output.close()


def carry_out(work: "Standalone", words: list[str]) -> int:
    """Do the work, and say how it ended. Gives the exit code."""
    for line in work.describe():
        work.printer.plain(line)
    kept = [word for word in words if not word.startswith(("overwrite=", "retry_failed="))]
    again = f"go on with: python launch/actor.py {shlex.join(kept)}"
    code = 0
    try:
        if work.is_unfinished():
            asyncio.run(work.run())
        work.output.finish()
    except (TreepoError, OSError) as error:
        _complain(f"error: {_reason(error)}")
        code = EXIT_BAD_CONFIG if isinstance(error, ConfigError | DataError) else EXIT_FAILED
    except KeyboardInterrupt:
        code = EXIT_STOPPED
    for line in work.tally.summary():
        work.printer.plain(line)
    end = {0: "done", EXIT_STOPPED: "stopped"}.get(code, "failed")
    work.printer.plain(f"{end}; {work.files()}{'' if code == 0 else f'; {again}'}")
    return code


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    named = (error.filename, error.strerror)
    return ": ".join(str(part) for part in named if part) or repr(error)


def _complain(text: str) -> None:
    """On standard error, if somebody reads it."""
    from treepo_async.actor.printer import Printer

    Printer(sys.stderr).plain(text)


def _open_closed_streams() -> None:
    """Give `>&-` somewhere to write to; else the next file that is opened would get the number of standard output."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until the end


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
