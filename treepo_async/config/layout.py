"""How the learner's ranks are laid out: the grammar of `learner=tp4pp2`."""

import re
from typing import NamedTuple, Self

from treepo_async.errors import ConfigError

_AXES = ("tp", "pp", "dp")


class Layout(NamedTuple):
    """Sizes of the learner's parallel groups."""

    tp: int = 1
    """Tensor parallel."""
    pp: int = 1
    """Pipeline parallel."""
    dp: int = 1
    """Data parallel."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return (
            "".join(f"{axis}{size}" for axis, size in zip(_AXES, self, strict=True) if size > 1)
            or "tp1"
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read e.g. `tp4pp2` or `tp2pp2dp2`; an axis that is left out has size 1.

        Raises:
            ConfigError: anything else, an axis named twice, a size of 0.
        """
        parts = re.findall(r"([a-z]+)(\d+)", text)
        axes = [axis for axis, _ in parts]
        well_formed = "".join(a + n for a, n in parts) == text and set(axes) <= set(_AXES)
        if (
            not parts
            or not well_formed
            or len(set(axes)) < len(axes)
            or any(int(n) == 0 for _, n in parts)
        ):
            raise ConfigError(
                f"learner.layout={text!r} is not a layout: write tp, pp and dp with their sizes, "
                "each at most once, e.g. learner=tp4pp2 or learner=tp2pp2dp2"
            )
        return cls(**{axis: int(size) for axis, size in parts})
