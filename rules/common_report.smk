"""What the report tells of single models: expectations of their generation, and answers to prompts."""


def expectations_wanted():
    """The expectations that the report tells, if the config asks for them."""
    if "generation" not in config:
        return []
    chosen = grid.chosen_points(config, "generation")
    return [f"{grid.folder(point)}/expectation.json" for point in chosen]


ANSWERING = grid.answering(config)


def answering(wildcards):
    """The points whose models answer, of one model and calibration set."""
    return grid.points_like(ANSWERING, wildcards)
