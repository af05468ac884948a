"""What a requester does about an answer: take it, greet and ask again, wait and ask again, or give up."""

from dataclasses import dataclass

from treepo_async.errors import DeadlineError, RefusedError
from treepo_async.wire.messages import AnyMessage, Hello, Nack, Refusal

LEAST_PAUSE_S = 0.05
"""Before a refused request is sent again, whatever the refusal says."""

Answer = tuple[AnyMessage, list[bytes]]


@dataclass(slots=True)
class Refusals:
    """The refusals of one request."""

    hello: Hello | None
    """With what the peer may greet."""
    last: Nack | None = None

    def accept(self, answer: Answer) -> Answer | None:
        """The answer if it is one; None if the same request may be sent again after `greets` and `pause_s`.

        Raises:
            RefusedError: for good, or the peer wants a greeting and there is none.
        """
        message = answer[0]
        if not isinstance(message, Nack):
            return answer
        wants_hello = message.reason == Refusal.HELLO_FIRST
        if not message.retry or (wants_hello and self.hello is None):
            raise RefusedError(message.reason, message.detail, retry=message.retry)
        was_greeted = self.greets()
        self.last = message
        if wants_hello and was_greeted:
            # greeting did not help: do not go round in circles without a pause
            self.last = Nack(
                reason=message.reason, detail=message.detail, retry_after_s=LEAST_PAUSE_S
            )
        return None

    def greets(self) -> bool:
        """Whether the last refusal asks for a greeting."""
        return self.last is not None and self.last.reason == Refusal.HELLO_FIRST

    def pause_s(self) -> float:
        """How long to wait before the request is sent again."""
        if self.last is None or (self.greets() and self.last.retry_after_s == 0):
            return 0.0
        return max(LEAST_PAUSE_S, self.last.retry_after_s)

    def deadline_error(self, wait: str, owner: str, timeout_s: float) -> DeadlineError:
        """What a wait ends with that outlived its deadline; it names the last refusal, if there was one."""
        if self.last is None:
            return DeadlineError(wait, owner, timeout_s)
        wait = f"{wait} (refused until then by {self.last.reason}: {self.last.detail})"
        return DeadlineError(wait, owner, timeout_s, self.last.reason)
