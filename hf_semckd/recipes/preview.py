"""What a recipe will do."""

from .progress import Voice
from .reading import Reading


def preview(reading: Reading, voice: Voice) -> None:
    """Tell."""
