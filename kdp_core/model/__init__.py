"""Models: where they come from, how their families are built, their checkpoints, and passes through single layers."""
