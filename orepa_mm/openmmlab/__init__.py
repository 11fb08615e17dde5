"""All that knows MMEngine."""

from .patches import patch

patch()
