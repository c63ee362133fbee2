"""What the tests of kernels for Hopper alone share."""

import pytest
import torch

_SERVED = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
HOPPER_ALONE = [pytest.mark.skipif(not _SERVED, reason="needs a Hopper GPU"), pytest.mark.own_architecture]
