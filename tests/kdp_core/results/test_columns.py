"""Values as the tables print them."""
import math

import pytest

from kdp_core.results import columns


@pytest.mark.parametrize(("value", "text"), [(0.5512, "55.1"), (math.nan, "–"), (None, "–"), (1e7, "1.0e9")])
def test_number(value, text):
    assert columns.number(columns.COLUMNS["acc"], value) == text
