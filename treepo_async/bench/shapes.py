"""What a tree decodes when every path reaches the limit: the closed form of TreePO's savings.

With no early stop the paths of a prompt number `first_fork` at the first level, `branch` times as many at each further
level, and at most `width`. Everything a trajectory shares with others is decoded once and delivered to each.
"""


def paths_per_level(width: int, depth: int, branch: int, first_fork: int) -> list[int]:
    """How many segments are decoded at each level, [depth]."""
    return [min(width, first_fork * branch**level) for level in range(depth)]


def reaches_width(width: int, depth: int, branch: int, first_fork: int) -> bool:
    """Whether the last level has `width` paths, so that no fallback is needed to deliver as many."""
    return paths_per_level(width, depth, branch, first_fork)[-1] == width


def decoded_share(width: int, depth: int, branch: int, first_fork: int) -> float:
    """Decoded tokens over those of `width` trajectories of `depth` segments each.

    That is decoded over delivered tokens where `reaches_width`; a shallower tree delivers fewer trajectories.
    """
    return sum(paths_per_level(width, depth, branch, first_fork)) / (width * depth)
