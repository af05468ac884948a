"""`python launch/export.py RUN hf=DIR [step=N] [dtype=float32|bfloat16] [model=DIR]`: a Hugging Face folder of a run's weights.

RUN is the folder of a run, at work or ended. Of its newest checkpoint that is whole, or of that of step N, the weights are written
with the config and the tokenizer of the model that the run began with (`model=` where that has moved), in the dtype of
the run unless another is named. Needs no GPU.

Exit codes: 0 done, 1 no such checkpoint is whole or a file cannot be read or written, 2 a bad word or folder, 130 stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.run import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_STOPPED, progress_bar
from treepo_async.cluster.export import ExportJob, export_run
from treepo_async.errors import ConfigError, DataError, TreepoError


def main(words: list[str]) -> int:
    """Export, and say what was written. Gives the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        job = ExportJob.parse(words)
        with progress_bar("warm start of the tiny model") as report:
            done = export_run(job, say=_complain, report=report)
    except (ConfigError, DataError) as error:
        _complain(f"error: {error}")
        return EXIT_BAD_CONFIG
    except (TreepoError, OSError) as error:
        _complain(f"error: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        _complain("stopped; nothing was written")
        return EXIT_STOPPED
    files = "1 file" if done.num_files == 1 else f"{done.num_files} files"
    print(
        f"exported policy version {done.version} (step {done.version.step}) to {done.folder}: "
        f"{files}, {done.num_bytes:,} bytes of {done.dtype}"
    )
    return 0


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
