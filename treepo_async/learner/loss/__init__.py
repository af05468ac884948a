"""From log-probs to a loss: policy losses, corrections, masks, normalizers, statistics. Pure."""
