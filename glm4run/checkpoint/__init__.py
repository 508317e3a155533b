"""Reading checkpoints: safetensors headers, the three layouts under Hugging Face names, tensors one at a time."""
