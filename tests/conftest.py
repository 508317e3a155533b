"""What all tests share: where the test material lies, which packages must be there, how many threads they take."""

from __future__ import annotations

import importlib.util
import os
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import settings

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"  # published configs, layouts and fixtures; not part of the project

_HOMES = count()

# A first call can load a native library; a deadline would make that a failure of the property.
settings.register_profile("glm4run", deadline=None, max_examples=50)
settings.load_profile("glm4run")

# What somebody measured of this machine must not change what the tests expect.
os.environ["GLM4RUN_CALIBRATION"] = str(REPO / "no-calibration.json")

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels are interpreted: the same code over CPU tensors. Read when Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; two pools of threads would fight. The variable is for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def homes_of_the_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what the user's own runs keep: sessions, history, the measured bandwidth."""
    home = tmp_path_factory.getbasetemp() / f"home-{next(_HOMES)}"  # made by whoever writes to it
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("GLM4RUN_SESSIONS", str(home / "sessions"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared test material; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared test material is not at {SHARED}")
    return SHARED


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` skip without one, `transformers` without it, except in CI: there it must be installed."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if item.get_closest_marker("transformers") is None:
        return
    missing = [name for name in ("transformers", "compressed_tensors") if importlib.util.find_spec(name) is None]
    if not missing:
        return
    reason = f"{' and '.join(missing)} not installed; `pip install -e .[dev]`"
    if os.environ.get("CI"):
        pytest.fail(f"in CI these tests may not be skipped: {reason}", pytrace=False)
    pytest.skip(reason)
