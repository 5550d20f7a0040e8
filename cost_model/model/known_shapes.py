"""Where a `config.json` comes from: a checkpoint directory, or the shapes of known models that ship with the package."""

import os
from pathlib import Path
from typing import Any

from policies.common import json_files
from policies.common.errors import DataError, InputMissingError, UsageError

#: Each file holds what the hub's `config.json` says of the shape, without what only training or generation needs.
SHAPES = Path(__file__).parent / "shapes"
SHAPE_OF_HUB_ID = {
    "mistralai/mixtral-8x7b-v0.1": "mixtral-8x7b",
    "mistralai/mixtral-8x7b-instruct-v0.1": "mixtral-8x7b",
    "mistralai/mixtral-8x22b-v0.1": "mixtral-8x22b",
    "mistralai/mixtral-8x22b-instruct-v0.1": "mixtral-8x22b-instruct",
    "microsoft/phi-3.5-moe-instruct": "phi-3.5-moe",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "qwen/qwen3-30b-a3b": "qwen3-30b-a3b",
    "qwen/qwen3-30b-a3b-base": "qwen3-30b-a3b-base",
    "qwen/qwen3-30b-a3b-instruct-2507": "qwen3-30b-a3b-2507",
    "qwen/qwen3-30b-a3b-thinking-2507": "qwen3-30b-a3b-2507",
    "qwen/qwen3-235b-a22b": "qwen3-235b-a22b",
    "qwen/qwen3-235b-a22b-instruct-2507": "qwen3-235b-a22b-2507",
    "qwen/qwen3-235b-a22b-thinking-2507": "qwen3-235b-a22b-2507",
    "qwen/qwen3-8b": "qwen3-8b",
    "qwen/qwen3-14b": "qwen3-14b",
    "qwen/qwen3-32b": "qwen3-32b",
    "qwen/qwen1.5-moe-a2.7b": "qwen1.5-moe-a2.7b",
    "qwen/qwen1.5-moe-a2.7b-chat": "qwen1.5-moe-a2.7b",
    "qwen/qwen2-57b-a14b-instruct": "qwen2-57b-a14b-instruct",
    "meta-llama/llama-2-70b-hf": "llama-2-70b",
    "meta-llama/llama-2-70b-chat-hf": "llama-2-70b",
    "meta-llama/llama-3.1-8b": "llama-3.1-8b",
    "meta-llama/llama-3.1-8b-instruct": "llama-3.1-8b",
    "meta-llama/llama-3.1-70b": "llama-3.1-70b",
    "meta-llama/llama-3.1-70b-instruct": "llama-3.1-70b",
    "meta-llama/llama-3.3-70b-instruct": "llama-3.1-70b",
    "meta-llama/llama-3.2-1b": "llama-3.2-1b",
    "meta-llama/llama-3.2-1b-instruct": "llama-3.2-1b",
    "meta-llama/llama-3.2-3b": "llama-3.2-3b",
    "meta-llama/llama-3.2-3b-instruct": "llama-3.2-3b",
    "mistralai/mistral-7b-v0.3": "mistral-7b-v0.3",
    "mistralai/mistral-7b-instruct-v0.3": "mistral-7b-v0.3",
    "microsoft/phi-4": "phi-4",
    "zai-org/glm-4.5-air": "glm-4.5-air",
    "zai-org/glm-4.5": "glm-4.5",
    "zai-org/glm-4.6": "glm-4.6",
    "minimaxai/minimax-m2": "minimax-m2",
    "allenai/olmoe-1b-7b-0924": "olmoe-1b-7b",
    "allenai/olmoe-1b-7b-0924-instruct": "olmoe-1b-7b",
    "baidu/ernie-4.5-21b-a3b-pt": "ernie-4.5-21b-a3b",
    "ibm-granite/granite-3.0-1b-a400m-base": "granite-3.0-1b-a400m",
    "ibm-granite/granite-3.0-1b-a400m-instruct": "granite-3.0-1b-a400m",
    "ibm-granite/granite-3.0-3b-a800m-base": "granite-3.0-3b-a800m",
    "ibm-granite/granite-3.0-3b-a800m-instruct": "granite-3.0-3b-a800m",
    "rednote-hilab/dots.llm1.inst": "dots.llm1",
}


def read_config(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file.

    Raises:
        InputMissingError: there is no such file, or it cannot be read.
        DataError: it is not JSON, or one that readers disagree about (`policies.common.json_files`).
    """
    try:
        return json_files.parse(Path(path).read_bytes())
    except OSError as error:
        raise InputMissingError(f"the model's config {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the model's config {path} is not valid JSON: {error}.") from error


def known_config(name: str) -> Any:
    """The config of a known model, by hub id or short name, in any case.

    Raises:
        UsageError: the model is not among the known ones, which are listed.
    """
    short_names = sorted(path.stem for path in SHAPES.glob("*.json"))
    shape = SHAPE_OF_HUB_ID.get(name.lower(), name.lower())
    if shape not in short_names:
        raise UsageError(
            f"the shape of {name!r} is not known; give a directory with a config.json, or one of "
            f"{', '.join([*short_names, *SHAPE_OF_HUB_ID])}."
        )
    return read_config(SHAPES / f"{shape}.json")
