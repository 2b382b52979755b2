"""What every test has: one thread, a fixed seed, no network, a cache of its own, and the shared data where it is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]

settings.register_profile("house", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Nets start from the same weights in every run and in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache for the session, shared by its workers: nothing is read from or left in the user's own."""
    base = tmp_path_factory.getbasetemp()
    shared_by_workers = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["INKDROP_CACHE"] = str(shared_by_workers / "cache")


@pytest.fixture(autouse=True, scope="session")
def _offline() -> Iterator[None]:
    """Only this machine can be reached: what needs the network fails here, not at a user's."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if internet and address[0] != "localhost" and not ip_address(address[0]).is_loopback:
            raise RuntimeError(f"tests run without the network, but something wants {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets that are too large for the project; tests that want it are skipped without it."""
    places = [Path(os.environ["INKDROP_SHARED"])] if "INKDROP_SHARED" in os.environ else []
    places += [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        pytest.skip("no shared data: set INKDROP_SHARED to a folder that holds mnist/, cifar10/, ...")
    return found
