"""How many processes were started together, known before anything large is imported."""

import os


def launched_processes() -> int:
    """Return how many processes a launcher has started together; 1 without one."""
    # A cluster may set one of them alone; what starts processes sets both.
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
