"""What all tests share: the process environment that TensorFlow needs, and the way to the real images."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

from hvd_imaging import bootstrap

bootstrap.prepare()
# Deadlines and the check for slow examples are timed assertions, which a busy machine fails.
hypothesis.settings.register_profile(
    "ours", hypothesis.settings(), deadline=None, suppress_health_check=[*hypothesis.settings().suppress_health_check, hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ours")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "parallel")]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the commands remember of exports and runs stays out of the home of who runs the tests."""
    os.environ["HVD_IMAGING_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HVD_IMAGING_STATE"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; tests that need it are skipped on machines without."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real images of ../shared/data are not on this machine")
    return folder


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """The folder of small inputs that once went wrong (``NN-name/in``), each with a README of the right answer."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "cases"
    if not folder.is_dir():
        pytest.skip("the inputs of ../shared/cases are not on this machine")
    return folder
