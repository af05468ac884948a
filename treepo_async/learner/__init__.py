"""The learner: scored trees in, one optimizer update, new weights out (Megatron-Core)."""
