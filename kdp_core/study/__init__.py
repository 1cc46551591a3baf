"""Studies beside the main workflow: theory, views of the kernel space, three spaces, published selections, planner."""
