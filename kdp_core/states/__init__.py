"""Hidden states: their extraction to Zarr, the states of one block, and the similarity of all layers."""
