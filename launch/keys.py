"""`python launch/keys.py DIR [NAME ...]`: CURVE keys, so that the sockets of a run may be reached from other machines.

DIR gets the server's keys, and those of a client `client`, or of each client NAME; called again with other names, it gets
theirs. `cluster.keys_dir=DIR` uses them. Deleting DIR/allowed/NAME.key shuts NAME out at its next connection. A machine that
only connects needs DIR/server.key and DIR/NAME.key_secret, with their modes.

Exit codes: 0 done, 1 a file cannot be written, 2 a bad word, or keys that are there already.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.run import EXIT_BAD_CONFIG, EXIT_FAILED
from treepo_async.errors import ConfigError
from treepo_async.wire.keys import CLIENT, make_keys


def main(words: list[str]) -> int:
    """Make the keys, and say which files they are. Gives the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    if not words or any("=" in word or word.startswith("-") for word in words):
        print("error: usage: python launch/keys.py DIR [NAME ...]", file=sys.stderr)
        return EXIT_BAD_CONFIG
    folder, *names = words
    try:
        written = make_keys(Path(folder), names or [CLIENT])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    for file in written:
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
