"""Scores, costs and diagnosis of pruned models: tasks, benchmarks, evaluation, latency and memory, states and outputs."""
