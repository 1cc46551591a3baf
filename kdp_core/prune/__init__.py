"""Makes a pruned checkpoint from a plan, and a fine-tuned variant of this checkpoint."""
