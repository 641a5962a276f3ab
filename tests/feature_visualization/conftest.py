"""The trained network of the demo."""

from tests.attribution.conftest import trained  # noqa: F401
