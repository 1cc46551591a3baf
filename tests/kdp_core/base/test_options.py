"""Options of a function: what its signature says is its schema and its check."""
from typing import Annotated, Literal

import jsonschema
import pytest
from annotated_types import Ge, Le

from kdp_core.base import options
from kdp_core.base.options import Count, Edge, OptionError, Positive, Share


def made(data, *, loss: Literal["chain", "local"] = "chain", epochs: Count = 2, heldout: Share = 0.1,
         protect: Edge = 0.1, sequences: Count | None = None, steps: Annotated[int, Ge(2), Le(8)] = 4,
         ridges: list[Positive] | None = None, keep: bool = True, device: str = "cpu"):
    """Something.

    loss: of what, told on
        two lines.
    epochs: passes.
    heldout: share.
    protect: share of the ends.
    sequences: null means all.
    steps: a few.
    ridges: several.
    keep: whether.
    device: where.
    """


VALUES = [("loss", "local", "chian", "loss is 'chian'; choose one of chain, local"),
          ("epochs", 1, 0, "epochs is 0; give a number at least 1"),
          ("epochs", 1, -3, "epochs is -3; give a number at least 1"),
          ("heldout", 0.5, 1.0, r"heldout is 1\.0; give a number below 1"),
          ("heldout", 0.5, 0, "heldout is 0; give a number above 0"),
          ("protect", 0, 0.5, r"protect is 0\.5; give a number below 0\.5"),
          ("sequences", None, 0, "sequences is 0; give a number at least 1"),
          ("steps", 8, 9, "steps is 9; give a number at most 8"),
          ("ridges", [0.1, 1], [0.1, 0.0], r"ridges is \[0\.1, 0\.0\]; give a number above 0"),
          ("ridges", None, 0.1, r"ridges is 0\.1; give a list")]


@pytest.mark.parametrize("name, right, wrong, message", VALUES)
def test_a_value_out_of_range_is_refused_by_check_and_schema_alike(name, right, wrong, message):
    schema = options.schema(made, ("device",))
    options.check(made, {name: right, "data": wrong})
    jsonschema.validate({name: right}, schema)
    with pytest.raises(OptionError, match=f"^{message}$"):
        options.check(made, {name: wrong})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({name: wrong}, schema)


def test_schema_holds_types_ranges_and_words():
    found = options.schema(made, ("device",))
    assert found["additionalProperties"] is False and found["x-module"] == __name__
    assert list(found["properties"]) == ["loss", "epochs", "heldout", "protect", "sequences", "steps", "ridges", "keep"]
    assert found["properties"]["loss"] == {"type": "string", "enum": ["chain", "local"],
                                           "description": "of what, told on two lines."}
    assert found["properties"]["epochs"] == {"type": "integer", "minimum": 1, "description": "passes."}
    assert found["properties"]["protect"] == {"type": "number", "minimum": 0, "exclusiveMaximum": 0.5,
                                              "description": "share of the ends."}
    assert found["properties"]["sequences"]["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "null"}]
    assert found["properties"]["ridges"]["anyOf"] == [
        {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}, {"type": "null"}]


def test_settings_are_defaults_overridden_by_what_is_given():
    assert options.settings(made, {"epochs": 7}, ("device",)) == {
        "loss": "chain", "epochs": 7, "heldout": 0.1, "protect": 0.1, "sequences": None, "steps": 4, "ridges": None,
        "keep": True}
    said = rf"'epoch' is unknown to {__name__}\.made; it knows loss, epochs.*; did you mean 'epochs'"
    with pytest.raises(OptionError, match=said):
        options.settings(made, {"epoch": 7})
