"""What holds for every test: the hypothesis profiles (HYPOTHESIS_PROFILE: default or nightly)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Images and servers take their time on a loaded machine: a slow example is no failure, and a hang is
# pytest-timeout's.
settings.register_profile(
    "default", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
