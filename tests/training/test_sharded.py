"""The fused error under FSDP2: two processes with sharded parameters have the gradients of one without."""

import pytest
from launching import TESTS, WORLD, torchrun


@pytest.mark.slow
def test_sharded_parameters_get_the_gradients_of_whole_ones():
    done = torchrun(TESTS / "sharded_worker.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"sharded over {WORLD}: ") == WORLD
