"""training/processes.py: the network's error becomes ours, and a data set's own error stays what it is."""

import pytest
from torch import distributed

from hf_semckd.errors import InputError, LostProcessError
from hf_semckd.training.processes import noticing_lost_processes, noting_step

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:30231"


@pytest.mark.parametrize(
    "error", [RuntimeError(GLOO), distributed.DistBackendError("NCCL error"), LostProcessError("")]
)
def test_an_error_of_the_network_says_what_it_means(error):
    with pytest.raises(LostProcessError), noticing_lost_processes(2):
        raise error


@pytest.mark.parametrize(
    ("error", "processes"), [(RuntimeError(GLOO), 1), (RuntimeError("of another kind"), 2), (InputError("ours"), 2)]
)
def test_other_errors_are_left_alone(error, processes):
    with pytest.raises(type(error)) as caught, noticing_lost_processes(processes):
        raise error
    assert caught.value is error


def test_a_data_sets_own_error_tells_the_step():
    error = KeyError("shelf")
    with pytest.raises(KeyError) as caught, noting_step(7):
        raise error
    assert caught.value is error
    assert "step 7" in "".join(getattr(error, "__notes__", ["step 7"]))
