"""Methods that remove heads and MLP channels inside layers. The modules `units` and `obs` contain the code that several
of these methods use."""
from kdp_core.methods.heads_channels import flap, llm_pruner, slimgpt, ziplm

METHODS = (*flap.METHODS, *llm_pruner.METHODS, *slimgpt.METHODS, *ziplm.METHODS)
