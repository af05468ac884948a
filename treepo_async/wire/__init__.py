"""What crosses processes: trees as bytes, messages, sockets. The only importer of zmq and msgspec.

No byte from a socket or from a file is ever unpickled, and every message is validated before anything is
allocated from its numbers.
"""
