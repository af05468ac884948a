"""Every knob of a run: its schema, the command line that sets it and the checks it must pass.

Imports no torch, sglang or Megatron, so that `--help` and a typo are answered at once.
"""
