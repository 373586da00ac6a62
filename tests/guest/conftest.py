"""Real guests: a Linux kernel under software emulation whose disk is our export."""

import pytest

from tests.guest.kernel import Kernel, cached_kernel


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """The guest's kernel, downloaded on first use."""
    return cached_kernel()
