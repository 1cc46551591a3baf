"""KDP's two steps: the kernel space (step 1) and the network back from it (step 2)."""
