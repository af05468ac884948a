"""Asynchronous TreePO: SGLang actors grow segment trees, a Megatron-Core learner trains on them."""
