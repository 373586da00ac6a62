"""The block drivers: one module each, found here, named nowhere."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from nbd_backend.block.driver import Driver, Drivers


@cache
def discover() -> Drivers:
    """Every driver by each of its names."""
    found: dict[str, Driver] = {}
    for module in pkgutil.iter_modules(__path__):
        driver: Driver = importlib.import_module(f"{__name__}.{module.name}").DRIVER
        for name in driver.names:
            if name in found:
                raise RuntimeError(f"two block drivers are named '{name}'; the second is in {module.name}.py")
            found[name] = driver
    return found
