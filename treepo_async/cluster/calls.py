"""Calls to the hosts of roles: their results, or what became of the host that gives none.

Waits: for a result (`RESULT_S`); and for a host that Ray cannot reach (`SILENT_S` in all, `ASK_S` for each further call), which is
asked again until it answers, Ray calls it or its node dead, or the time is over. Ray may hold such a call until it reaches the host;
the driver then hears of the other roles later.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treepo_async.cluster.hosts import Hosts, last_line
from treepo_async.errors import RoleError

RESULT_S = 60.0
SILENT_S = 30.0
ASK_S = 1.0
"""What a call to a silent host has at least, also where its time is nearly over."""


class HostGoneError(RoleError):
    """The host of a role is gone, and its process with it; of a node that is going this shows long before Ray calls it dead."""


class HostSilentError(RoleError):
    """The host of a role cannot be reached, and may live; whether it did what it was asked is not known."""


@dataclass
class Calls:
    """See the module."""

    ray: Any
    hosts: Hosts
    log_dir: Path
    tell: Callable[[str], None]
    """Takes a line for the user."""
    _silent_since: dict[str, float] = field(default_factory=dict)

    def result(self, role: str, reference: Any) -> Any:
        """The result of a call to a role's host.

        Args:
            role: its name.
            reference: Ray's, of the call.

        Raises:
            HostSilentError: there is none, and the host may live: ask again.
            HostGoneError: there is none, and the host is gone or was silent for too long.
            RoleError: there is none.
        """
        try:
            result = self.ray.get(reference, timeout=self._timeout_s(role))
        except self.ray.exceptions.RayError as error:
            raise self._named(role, error) from error
        self._silent_since.pop(role, None)
        return result

    def tail_of(self, role: str) -> str:
        """The last lines of a role's log, where this machine has it."""
        file = self.log_dir / f"{role}.log"
        return "\n".join(file.read_text().splitlines()[-30:]) if file.exists() else ""

    def _timeout_s(self, role: str) -> float:
        if role not in self._silent_since:
            return RESULT_S
        return max(ASK_S, self._silent_since[role] + SILENT_S - time.monotonic())

    def _named(self, role: str, error: Any) -> RoleError:
        """What Ray raised, as an error of a role."""
        exceptions, node = self.ray.exceptions, self.hosts.node_of(role)
        if isinstance(error, exceptions.RayTaskError):
            why = f"{type(error.cause).__name__}: {last_line(error.cause)}"
            return RoleError(role, f"cannot be run on node {node}: {why}", self.tail_of(role))
        what = f"{type(error).__name__} {next(iter(str(error).splitlines()), '')}"
        if self._may_live(role, error):
            self._begin_silence(role, f"{role} on node {node} does not answer: {what}")
            return HostSilentError(role, f"does not answer on node {node}: {what}", tail="")
        cause = f"lost its Ray worker on node {node}: {what}"
        if role in self._silent_since:
            cause = f"{cause} (it was asked for up to {SILENT_S:g} s)"
        kind = HostGoneError if self._is_gone(role, error) else RoleError
        self._silent_since.pop(role, None)
        return kind(role, cause, self.tail_of(role))

    def _may_live(self, role: str, error: Any) -> bool:
        if not isinstance(error, self.ray.exceptions.ActorUnavailableError):
            return False
        now = time.monotonic()
        is_late = now - self._silent_since.get(role, now) >= SILENT_S
        return not is_late and not self.hosts.is_lost(role)

    def _is_gone(self, role: str, error: Any) -> bool:
        """Of an error of a host that is not asked again."""
        exceptions = self.ray.exceptions
        dead = exceptions.RayActorError, exceptions.ActorUnschedulableError
        is_late = role in self._silent_since and isinstance(error, exceptions.GetTimeoutError)
        return isinstance(error, dead) or is_late or self.hosts.is_lost(role)

    def _begin_silence(self, role: str, text: str) -> None:
        if role not in self._silent_since:
            self._silent_since[role] = time.monotonic()
            self.tell(f"{text}; asking again for up to {SILENT_S:g} s")
