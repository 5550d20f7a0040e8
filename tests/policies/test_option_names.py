"""Messages call options by what the caller can give."""

import pytest

from policies.common.command_line import guarded
from policies.common.errors import UsageError
from policies.common.option_names import are_flags, option


def test_options_are_arguments_in_python_and_flags_in_a_command(capsys):
    def body():
        raise UsageError(f"{option('gpu_mem')}, {option('overwrite', True)}, {option('checkpoint_interval_s', 5)}")

    with pytest.raises(UsageError, match="^gpu_mem, overwrite=True, checkpoint_interval_s=5$"):
        body()
    assert guarded("program", body) == 2
    assert capsys.readouterr().err == "program: --gpu-mem, --overwrite, --checkpoint-interval 5\n"
    assert not are_flags() and option("dtype", "float16") == "dtype='float16'"
