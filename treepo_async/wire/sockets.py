"""Sockets with names, deadlines and no silent loss. Outside of this package nobody touches zmq.

A `Router` serves many peers and answers each by its identity; a `Requester` (asyncio) or `BlockingRequester`
asks it, sends again while no answer comes, and raises DeadlineError in the end. Mandatory routing, immediate
connections, small high-water marks and heartbeats make a lost peer visible instead of swallowing messages.
"""

from treepo_async.wire.requester import BlockingRequester, Requester
from treepo_async.wire.router import Router

__all__ = ["BlockingRequester", "Requester", "Router"]
