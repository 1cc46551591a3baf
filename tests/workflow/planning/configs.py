"""Variations of the pico configuration that several tests check."""
from tests.workflow.project import CONFIG


def with_ablation(**own):
    more = {"kdp_8": {"base": "kdp", "kernel": {"features": 8}}}
    return {**CONFIG, "methods": CONFIG["methods"] | more, "ablations": {
        "size": {"title": "Size", "caption": "Sizes.", "x": ["kernel.features"], "variants": ["kdp", "kdp_8"], **own}}}


def with_seeds(*seeds, **more):
    few = {**CONFIG["calibrations"]["few"], "seeds": list(seeds)}
    return {**CONFIG, "calibrations": {"few": few, "other": CONFIG["calibrations"]["few"]}, **more}


def with_model(grid=(), methods=(), **own):
    models = {"pico": {"source": "model", **own}, "other": {"source": "model", "device": "balanced", "gpus": 4}}
    more = {name: {} for name in methods}
    return {**CONFIG, "models": models, "methods": CONFIG["methods"] | more,
            "grid": CONFIG["grid"] | {"methods": ["remove", "kdp", *methods], **dict(grid)}}
