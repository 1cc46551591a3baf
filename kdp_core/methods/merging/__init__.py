"""Methods that merge layers: LaCo and sliding-window merging, and the functions that both share."""
from kdp_core.methods.merging import laco, sliding_merge

METHODS = (*laco.METHODS, *sliding_merge.METHODS)
