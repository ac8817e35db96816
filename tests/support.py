"""What several test modules share."""

import os
import shutil

import pytest


def under_ci() -> bool:
    """Whether ``CI`` says that this machine must have everything the tests need."""
    return os.environ.get("CI", "").lower() in {"1", "true"}


def require(program: str) -> str:
    """Return the path of an interpreter; without it the test is skipped, or fails where ``CI=true``."""
    path = shutil.which(program)
    if path is not None:
        return path
    reason = f"needs {program}, which is not on PATH"
    if under_ci():
        pytest.fail(f"{reason}; under CI=true nothing may be missing", pytrace=False)
    pytest.skip(reason)
