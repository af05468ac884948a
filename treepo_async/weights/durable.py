"""Folders that are there as a whole or not at all, also after a power cut. Neighbours: `checkpoints` and `export` write them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from treepo_async.wire.whole_file import sync


def make_folder(folder: Path) -> None:
    """Make a folder with those above it, each on disk before the next."""
    if folder.is_dir():
        return
    make_folder(folder.absolute().parent)
    folder.mkdir(exist_ok=True)
    sync(folder.absolute().parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a flat folder its final name, once its files are on disk.

    Args:
        temporary: beside `final`.
        final: not there yet.
    """
    for file in sorted(temporary.iterdir()):
        sync(file)
    sync(temporary)
    temporary.rename(final)
    sync(final.absolute().parent)


@contextlib.contextmanager
def spared(unremoved: Callable[[OSError], None]) -> Iterator[None]:
    """Tell of what cannot be removed, and go on: what was published is safe without it."""
    try:
        yield
    except OSError as error:
        unremoved(error)
