"""The fused error under FSDP2: two processes with sharded parameters have the gradients of one without."""

import pytest
from launching import torchrun

WORLD = 2


@pytest.mark.slow
def test_sharded_parameters_get_the_gradients_of_whole_ones():
    done = torchrun("sharded_worker.py", processes=WORLD, seconds=200)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(f"sharded over {WORLD}: ") == WORLD
