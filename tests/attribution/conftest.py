"""A trained network of the demo; comparisons with captum are made where that is installed."""

from importlib.util import find_spec

import pytest

from tests.attribution.trained import digit_pictures, trained_digits

collect_ignore = [] if find_spec("captum") else ["test_captum.py"]


@pytest.fixture
def trained():
    """The network of the demo after some training, and pictures with labels that it has not seen."""
    return trained_digits(), *digit_pictures()
