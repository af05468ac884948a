"""What lets SGLang and Megatron-Core run where there is no CUDA device.

Nothing in here acts on a machine that has one: `environment` answers with an empty mapping there.
"""
