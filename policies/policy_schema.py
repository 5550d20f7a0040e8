"""The JSON Schema of a policy file. `python -m scripts.schemas` writes it to `policy.schema.json`.

What a program refuses when it loads a file, the policy and the workload, is described by the rules of these classes. The
other sections tell where a policy comes from; `cost_model` writes them, and nothing is decided by them but whether a model
is the one that the policy was made for.
"""

from __future__ import annotations

from policies.common.fields import Json
from policies.common.json_schema import definitions, file_head, header_schema, object_schema, with_properties
from policies.policy import KIND, SCHEMA_VERSION, Policy
from policies.workload import Workload

_COUNT, _SIZE, _QUANTITY = ({"$ref": f"#/$defs/{name}"} for name in ("count", "size", "quantity"))
_TEXT, _SWITCH = {"type": "string"}, {"type": "boolean"}
_MODEL = {
    "model_type": _TEXT,
    **dict.fromkeys(("hidden", "num_layers", "num_experts", "top_k", "num_heads", "num_kv_heads"), _COUNT),
    **dict.fromkeys(("head_dim", "ffn", "vocab_size"), _COUNT),
    "attention_bias": _SWITCH,
    "head_bias": _SWITCH,
    "dense_layers": {"type": "array", "items": _SIZE},
    "dense_ffn": _COUNT,
    "weight_format": {"description": "What its weights are packed in; absent: nothing.", **_TEXT},
}
_HARDWARE = {
    "name": _TEXT,
    "device": {"enum": ["cuda", "cpu"]},
    "gpu": {"description": "Name of the compute device.", **_TEXT},
    **dict.fromkeys(("gpu_memory_bytes", "host_memory_bytes", "disk_bytes"), _SIZE),
}
_TIERS = {"type": "object", "properties": dict.fromkeys(("gpu", "cpu", "disk"), _SIZE)}
_PREDICTED = {
    "tokens_per_s": {"description": "Generated tokens per second.", **_QUANTITY},
    "prefill_tokens_per_s": _QUANTITY,
    "decode_tokens_per_s": _QUANTITY,
    "job_s": {"description": "Null for a job without end.", "type": ["number", "null"], "minimum": 0},
    "sweep_s": _QUANTITY,
    "row_s": {"description": "Seconds that a row is in flight.", **_QUANTITY},
    "rows_in_flight": _QUANTITY,
    "bottleneck": {"description": "What decides most of the time.", **_TEXT},
    "lanes_s": {
        "description": "Busy seconds of each lane within wall_s.",
        "type": "object",
        "additionalProperties": _QUANTITY,
    },
    "wall_s": _QUANTITY,
    "memory_bytes": {"description": "Peak bytes of each tier.", **_TIERS},
}


def policy_schema() -> dict[str, Json]:
    """The schema as a dict of JSON values."""
    sections = {
        "model": _section("Shape fingerprint of the model; empty or absent: any model; else all must agree.", _MODEL),
        "hardware": _section("The machine the policy was made for, and what it could take of it.", _HARDWARE),
        "workload": {
            "description": "The job the policy was made for; empty or absent: none in particular.",
            **object_schema(Workload, complete=False),
        },
        "predicted": _section(
            "What the planner expects of the policy: of the whole job, of the steady state where it has no end.",
            _PREDICTED,
        ),
    }
    file = {"type": "object", "required": ["policy"], "additionalProperties": False, "properties": sections}
    file["properties"] = sections | {"policy": object_schema(Policy)}
    return {
        **file_head(
            "FlexMoE policy file",
            "What the runtime is told to do, and what it was made for. Beyond this schema the two percents of a pair (w_, "
            "cache_, act_) may not sum to more than 100; what is left is disk.",
        ),
        **with_properties(file, header_schema(KIND, SCHEMA_VERSION)),
        "$defs": definitions((Policy, Workload)) | {"quantity": {"type": "number", "minimum": 0}},
    }


def _section(description: str, properties: dict[str, Json]) -> dict[str, Json]:
    return {"description": description, "type": "object", "properties": properties}
