"""LoRA weights: their files and names, and how they get onto a transformer."""
