"""The Megatron model: its sizes, its layers, its head, and Hugging Face weights in and out."""
