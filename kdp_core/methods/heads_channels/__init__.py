"""Methods that remove heads and MLP channels inside layers, and the units and the surgeon that these methods share."""
from kdp_core.methods.heads_channels import flap, llm_pruner, slimgpt, ziplm

METHODS = (*flap.METHODS, *llm_pruner.METHODS, *slimgpt.METHODS, *ziplm.METHODS)
