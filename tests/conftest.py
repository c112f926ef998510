"""What tests of all folders share."""

import pytest

from kernelwarehouse.models.ops.kernel_warehouse.tuned import forget


@pytest.fixture
def untuned():
    """Nothing is known of what is fastest, before the test and after it."""
    forget()
    yield
    forget()
