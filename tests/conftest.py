import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_random_state():
    torch.manual_seed(0)
