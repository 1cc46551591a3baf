"""Methods that remove heads and MLP channels inside layers. The modules `units` and `obs` contain what these methods
share."""
from kdp_core.methods.heads_channels import flap, llm_pruner, slimgpt, ziplm

METHODS = (*flap.METHODS, *llm_pruner.METHODS, *slimgpt.METHODS, *ziplm.METHODS)
