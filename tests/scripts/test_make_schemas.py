import json

import pytest

from scripts.make_schemas import all_schemas

SCHEMAS = all_schemas()


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_the_shipped_schema_is_the_one_that_the_classes_give(path):
    assert path.read_text("utf-8") == json.dumps(SCHEMAS[path], indent=2) + "\n", "run python -m scripts.make_schemas"
