"""Scores, costs and diagnosis of pruned models: tasks, benchmarks, latency and memory, states and outputs."""
