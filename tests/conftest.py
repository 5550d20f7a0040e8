"""Shared by all tests: the runtime's OpenMP setting has to be in place before anything loads torch."""

import flexmoe  # noqa: F401
