"""Every test of this folder runs in one process of its own: it registers a device there."""

from __future__ import annotations

import pytest
from own_process import OwnProcess

PROCESS = pytest.StashKey[OwnProcess]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    stash = pyfuncitem.config.stash
    if PROCESS not in stash:
        stash[PROCESS] = OwnProcess()
        pyfuncitem.config.add_cleanup(stash[PROCESS].close)
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    stash[PROCESS].call(pyfuncitem.path, pyfuncitem.originalname, arguments)
    return True
