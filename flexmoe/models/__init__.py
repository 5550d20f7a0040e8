"""Model families. A new family is one file here and one entry below."""

from cost_model.arch import ModelArch
from flexmoe.errors import DataError
from flexmoe.models.mixtral import Mixtral

FAMILIES = {"mixtral": Mixtral}


def family(arch: ModelArch):
    """The family object for a shape.

    Raises:
        DataError: no family runs this model type, though it can be planned for; the sentence lists those that run.
    """
    if arch.model_type not in FAMILIES:
        raise DataError(
            f"{arch.name or 'the model'} is of the family {arch.model_type!r}, which can be planned for but not run; "
            f"use a model of a family that runs: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[arch.model_type](arch)
