"""Writes the JSON Schemas that ship with the package, from the rules of the classes that read the files.

python -m scripts.make_schemas
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import cost_model
import policies
from cost_model.hardware.hardware_schema import hardware_schema
from policies.common.fields import Json
from policies.common.json_files import write_json
from policies.policy_schema import policy_schema


def all_schemas() -> Mapping[Path, Json]:
    """Every schema by its file."""
    return {
        Path(policies.__file__).parent / "policy.schema.json": policy_schema(),
        Path(cost_model.__file__).parent / "hardware" / "hardware.schema.json": hardware_schema(),
    }


if __name__ == "__main__":
    for path, schema in all_schemas().items():
        write_json(path, schema, "the schema")
        print(path)
    sys.exit(0)
