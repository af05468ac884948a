"""Published weights: write-once folders with a manifest, from the learner to the engine hosts."""
