"""Models: their sources, the structure of their families, their checkpoints, and passes through single layers."""
