"""How a role of a run introduces itself to replay."""

from treepo_async.config.wiring import Wiring
from treepo_async.wire.messages import Hello


def hello_of(wiring: Wiring) -> Hello:
    """The greeting of a role: its name, its run, and what replay must have been given alike."""
    return Hello(
        name=wiring.role,
        run_id=wiring.run_id,
        config_digest=wiring.config_digest,
        tokenizer_digest=wiring.tokenizer_digest,
    )
