"""kdp_residual: stand-ins with a skip path and a dictionary of the model's own neurons."""
