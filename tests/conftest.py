import pytest
import torch

torch.set_num_threads(1)  # the models here are so small that a second thread only costs


@pytest.fixture(autouse=True)
def _fresh_random_state():
    torch.manual_seed(0)
