"""Settings of every test: no network, one thread for tokenizers, and a cache directory for this run of the tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Set before any library reads them. A test that needs the hub is wrong: it must fail at once, not after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks spawned by tests share the cores
os.environ.setdefault("MPLBACKEND", "agg")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its first import, in any test


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Put the caches of rmcore and datasets into a fresh directory, also for processes that a test starts."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RMCORE_CACHE", str(cache / "rmcore"))
        patch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
        yield cache
