import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whichever test does

torch.set_num_threads(1)  # the models here are so small that a second thread only costs


@pytest.fixture(autouse=True)
def _fresh_random_state():
    torch.manual_seed(0)


@pytest.fixture
def cnn():
    from fastlur.demo import residual_cnn

    return residual_cnn(width=4)


@pytest.fixture
def two(tmp_path):
    """Two checkpoints of a run, and what wrote them."""
    from checkpoints import Two

    made = Two(tmp_path)
    yield made
    made.close()
