"""JSON Schemas whose completions end by themselves, whatever a model writes."""

_NAME = {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"}
SCHEMAS = (
    {
        "type": "object",
        "properties": {
            "name": _NAME,
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None, True]}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "point": {
                "type": "array",
                "prefixItems": [{"enum": [0, 1]}, {"enum": [-1, 2.5]}],
                "items": False,
                "minItems": 2,
            }
        },
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"type": "string", "maxLength": 5}]},
    {"type": "array", "items": {"type": "string", "format": "date"}, "minItems": 1, "maxItems": 2},
    {
        "type": "object",
        "properties": {"kind": {"const": "río"}, "size": {"type": "integer", "exclusiveMinimum": 3, "maximum": 999}},
        "required": ["size", "kind"],
        "additionalProperties": False,
    },
    {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 99, "multipleOf": 3}]},
    {
        "type": "object",
        "patternProperties": {"^[xyz]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 3,
    },
)
