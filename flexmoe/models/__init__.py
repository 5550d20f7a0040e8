"""Model families. A new family is one file here and one entry below."""

from cost_model.arch import ModelArch
from flexmoe.errors import DataError
from flexmoe.models.mixtral import Mixtral

FAMILIES = {"mixtral": Mixtral}


def family(arch: ModelArch):
    """The family object for a shape.

    Raises:
        DataError: no family runs this model type; the sentence lists those that do.
    """
    if arch.model_type not in FAMILIES:
        raise DataError(f"model type {arch.model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[arch.model_type](arch)
