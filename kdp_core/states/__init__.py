"""Hidden states: extracted to Zarr, the states of one block, and how alike the states of all layers are."""
