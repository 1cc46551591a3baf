"""Methods that merge layers: LaCo and sliding-window merging, with what both share."""
from kdp_core.methods.merging import laco, sliding_merge

METHODS = (*laco.METHODS, *sliding_merge.METHODS)
