"""Between two benches the memory of the first one goes back: graphs, optimisers and models of
gigabytes that reference cycles would keep."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_goes_back():
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
