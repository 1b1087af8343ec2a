import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def groups():
    """Process groups by size, started when first used and shared by all tests."""
    started = {}

    def of(size):
        return started.setdefault(size, Ranks(size))

    yield of
    for group in started.values():
        group.stop()


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, groups):
    """A process group of 2 ranks; of 4 as well among the slow tests."""
    return groups(request.param)


@pytest.fixture(scope="session")
def two(groups):
    """Two ranks, for what does not depend on their number."""
    return groups(2)
