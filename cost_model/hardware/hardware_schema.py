"""The JSON Schema of a hardware file. `python -m scripts.make_schemas` writes it to `hardware.schema.json`."""

from __future__ import annotations

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import KIND, SCHEMA_VERSION, Gpu, Hardware
from policies.common.fields import Json
from policies.common.json_schema import definitions, file_head, header_schema, object_schema, with_properties


def hardware_schema() -> dict[str, Json]:
    """The schema as a dict of JSON values."""
    return {
        **file_head(
            "FlexMoE hardware file",
            "What the planner knows of a machine. Beyond this schema, tokens, weight_elements and the bytes of a link's curve "
            "rise, and flops_per_s has a row for each of weight_elements with a rate for each of tokens.",
        ),
        **with_properties(object_schema(Hardware), header_schema(KIND, SCHEMA_VERSION)),
        "$defs": {
            "gpu": object_schema(Gpu),
            "gemm_rates": object_schema(GemmRates),
            **definitions((Hardware, Gpu, GemmRates)),
        },
    }
