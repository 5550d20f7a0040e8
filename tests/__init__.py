import pytest

# Failures in there show their values too.
pytest.register_assert_rewrite("tests.support")
