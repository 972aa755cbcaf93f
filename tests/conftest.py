import gc
import os

# Before any import: nothing in the tests may touch a network or need a display.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

from aegpo import models
from aegpo.config import Model

torch.set_num_threads(1)
gc.freeze()  # half a million objects of the libraries never go, and looking through them was a tenth of the tests' time
gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="module")
def model():
    """The embedded model with an untrained adapter: the base policy."""
    return models.load(Model())


@pytest.fixture(scope="module")
def moved_policy():
    """The same after its adapter has moved, so that it is another policy than its base."""
    model = models.load(Model())
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable.values()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return model
