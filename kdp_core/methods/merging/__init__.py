"""Two methods that merge layers, LaCo and sliding-window merging, and the functions that both methods use."""
from kdp_core.methods.merging import laco, sliding_merge

METHODS = (*laco.METHODS, *sliding_merge.METHODS)
