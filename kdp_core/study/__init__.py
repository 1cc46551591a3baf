"""Studies beside the main line of the flow: theory, kernel-space views, three spaces, published oracles, planner."""
