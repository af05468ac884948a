"""Everything this package raises on purpose.

TreepoError
├── ConfigError        a key or a value that cannot be run; exit code 2, no traceback
├── DataError          a data file, record or answer that cannot be used
├── TreeError          a tree that breaks an invariant of `types.Tree`
├── WireError          bytes or a message that breaks the protocol
│   └── RefusedError        the peer understood and said no; carries its reason
├── EngineError        the inference engine answered wrongly or not at all
├── WeightsError       a publication that must not reach an engine, or an engine with the wrong weights
├── DeadlineError      a wait that outlived its deadline; names the wait and its owner
│   └── ClosedError         a gate that let no request pass in time: nothing was sent
└── RoleError          a process of the run died for good; carries its last lines

Messages name the key or field, the value found, and the way out.
"""


class TreepoError(Exception):
    """Root of the tree above."""


class ConfigError(TreepoError, ValueError):
    """A key or a value that cannot be run."""


class DataError(TreepoError, ValueError):
    """A data file, record or answer that cannot be used."""


class TreeError(TreepoError, ValueError):
    """A tree that breaks an invariant."""


class WireError(TreepoError, ValueError):
    """Bytes or a message that breaks the protocol."""


class RefusedError(WireError):
    """The peer understood the message and refused it.

    Attributes:
        reason: the peer's word for it, e.g. `invalid` or `lease_closed`.
        retry: whether sending the same message again can succeed.
        retry_after_s: not before this time.
    """

    def __init__(
        self, reason: str, detail: str, *, retry: bool, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.retry = retry
        self.retry_after_s = retry_after_s


class EngineError(TreepoError, RuntimeError):
    """The inference engine answered wrongly or not at all."""


class WeightsError(TreepoError, RuntimeError):
    """A publication that must not reach an engine, or an engine with the wrong weights."""


class DeadlineError(TreepoError, TimeoutError):
    """A wait outlived its deadline.

    Args:
        wait: what was waited for, as a person would say it.
        owner: who should have ended the wait.
        seconds: the deadline.
        refusal: the reason of the last refusal, where the wait was for an answer and it was refused; kept as an attribute.
    """

    def __init__(self, wait: str, owner: str, seconds: float, refusal: str = "") -> None:
        super().__init__(f"waited {seconds:g} s for {wait}; {owner} should have ended it")
        self.refusal = refusal


class ClosedError(DeadlineError):
    """A gate did not let a request pass in time: nothing was sent."""


class RoleError(TreepoError, RuntimeError):
    """A process of the run died for good.

    Attributes:
        role: its name, e.g. `engine-0`.
        tail: its last lines of output.
    """

    def __init__(self, role: str, cause: str, tail: str) -> None:
        super().__init__(f"{role} {cause}")
        self.role = role
        self.tail = tail
