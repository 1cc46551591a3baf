"""What the report says about single models: expectations of their generation, and answers to prompts."""


def expectations_wanted():
    """The expectations that the report shows, if the config asks for them."""
    if "generation" not in config:
        return []
    chosen = grid.chosen_points(config, "generation")
    return [f"{grid.folder(point)}/expectation.json" for point in chosen]


def agreements_wanted():
    """The comparisons of searches that the report shows, if the config asks for them."""
    ratios = config["grid"]["ratios"] if "agreement" in config else []
    return [
        f"{CALIBRATED}/agreement-r{ratio:g}.json".format(model=model, calib=calib)
        for model, calib in MODELS
        for ratio in ratios
    ]


def searches_compared(wildcards):
    """The results of the compared searches of a ratio, in the order of `grid.compared`."""
    point = dict(wildcards) | {"k_max": config["grid"]["k_max"][0]}
    return [
        f"{POINT}/composed.safetensors".format(**point | {"method": name})
        for name in grid.compared(config)
    ]


ANSWERING = grid.answering(config)


def answering(wildcards):
    """The points of one model and calibration set whose models answer prompts."""
    return grid.points_like(ANSWERING, wildcards)
