"""Models: sources, structure of the families, checkpoints, and passes through single layers."""
