"""What a pruned model is worth: tasks, benchmarks, costs, and where it differs from the dense model."""
