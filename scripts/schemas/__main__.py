"""Writes the JSON Schemas that ship with the package.

python -m scripts.schemas
"""

import sys

from policies.common.json_files import write_json
from scripts.schemas.files import all_schemas

if __name__ == "__main__":
    for path, schema in all_schemas().items():
        write_json(path, schema, "the schema")
        print(path)
    sys.exit(0)
