"""Studies beside the main workflow: theory, kernel space, three spaces, published selections of layers, planner."""
