"""From a plan to a pruned checkpoint, and its fine-tuned variant."""
