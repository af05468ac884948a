"""The built-in tasks by name, each with the recipe of its warm start. Imports no torch."""

from dataclasses import dataclass

from treepo_async.config.schema import TINY, TINY_PRECEDENCE
from treepo_async.tiny import chain, precedence
from treepo_async.tiny.recipe import Recipe
from treepo_async.tiny.task import Task


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A task and how a model is taught it."""

    name: str
    """Of `model` and `data`, of the cached folder, and in the ids of prompts."""
    task: Task
    recipe: Recipe


BUILT_INS = {
    built_in.name: built_in
    for built_in in (
        BuiltIn(TINY, chain, chain.RECIPE),
        BuiltIn(TINY_PRECEDENCE, precedence, precedence.RECIPE),
    )
}
