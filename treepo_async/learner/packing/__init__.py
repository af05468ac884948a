"""From trees to microbatches: pieces, their cost, where they go, how they are laid out."""
