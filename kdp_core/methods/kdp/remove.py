"""KDP without its stand-ins: the blocks are removed without a replacement (`w/o kernel` of KDP's Table 1)."""
from kdp_core.methods._method import Method
from kdp_core.methods._select import most_similar

METHODS = (
    Method("remove", "KDP (ICLR 2026), `w/o kernel` of Table 1: the blocks are removed, nothing takes their place",
           "layers removed", most_similar),
)
