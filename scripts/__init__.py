"""Benchmarks, checks and the demonstration, each run as `python -m scripts.NAME`."""

import flexmoe  # noqa: F401 - sets how idle threads wait, before a script loads torch
