"""Studies outside the main flow: theory, kernel-space views, three spaces, published oracles, planner."""
