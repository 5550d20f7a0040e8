"""Builds the transformers tokenizer of a directory, and says what is missing where that cannot be done."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexmoe.checkpoint.files import INCOMPLETE, open_file, read_bytes, read_json_object
from flexmoe.errors import FlexMoEError
from flexmoe.text.chat_template import first_line
from policies.common.errors import EXIT_DATA

# One of these holds the vocabulary; tokenizer_config.json alone does not make a tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_MODELS = ("tokenizer.model", "spiece.model")
#: By the name under which they are installed: the module to look for.
_MODULES = {
    "sentencepiece": "sentencepiece",
    "protobuf": "google.protobuf",
    "tiktoken": "tiktoken",
    "mistral-common": "mistral_common",
}
#: A line of a vocabulary for tiktoken: a token in base64, and its rank.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_HEAD_BYTES = 1 << 12


class TokenizerError(FlexMoEError):
    """The tokenizer cannot be built: a package or a file is missing, or one is damaged. Only text needs it."""

    exit_code = EXIT_DATA


def build(directory: Path) -> Any:
    """The tokenizer, from local files and without running code from them.

    Raises:
        TokenizerError: it cannot be built.
    """
    if (
        missing := _missing_packages(directory)
    ) is not None:  # before transformers says so, at length, in its own words
        raise TokenizerError(f"the tokenizer in {directory} cannot be built: {missing}")
    from transformers import AutoTokenizer  # imported here because it takes seconds

    try:
        with _as_text(directory) as path:
            return AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, clean_up_tokenization_spaces=False
            )
    # A damaged file surfaces as whatever the parser behind it raises, bare Exception included.
    except Exception as error:
        raise TokenizerError(f"the tokenizer in {directory} cannot be built: {_reason(directory, error)}") from error


def check_files(directory: Path) -> None:
    """Shows that the tokenizer's files are files, and that the packages are there which they need; they are not parsed.

    Raises:
        TokenizerError: as `build`.
    """
    reason = _missing_packages(directory)
    for path in _files(directory):
        try:
            _head(path)
        except FlexMoEError as error:
            reason = reason or str(error)
    if reason is not None:
        raise TokenizerError(f"the tokenizer in {directory} cannot be built: {reason}")


@contextmanager
def _as_text(directory: Path) -> Iterator[str]:
    """A path of the directory that is Unicode, as the tokenizers' libraries want it: names on a disk are any bytes."""
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        yield str(directory)


def _reason(directory: Path, error: Exception) -> str:
    damaged = next(filter(None, map(_damage, _files(directory))), None)
    if damaged is not None:
        return damaged
    names = {path.name for path in _files(directory)}
    if "vocab.json" in names and "tokenizer.json" not in names and not (directory / "merges.txt").is_file():
        return f"merges.txt is missing beside vocab.json; {INCOMPLETE}"
    return f"{first_line(error)}; compare its files with the original's"


def _missing_packages(directory: Path) -> str | None:
    missing = [name for name in _packages(directory) if not _is_installed(_MODULES[name])]
    if not missing:
        return None
    packages = " and ".join(missing)
    return (
        f"it needs the Python package{'s' * (len(missing) > 1)} {packages}, not installed here; run pip install "
        f"{' '.join(missing)}, or put the tokenizer.json of the model there"
    )


def _files(directory: Path) -> list[Path]:
    names = (*VOCABULARY_FILES, "tokenizer_config.json")
    return [directory / name for name in names if (directory / name).is_file()]


def _packages(directory: Path) -> tuple[str, ...]:
    """What transformers needs to read the vocabulary that is there."""
    names = {path.name for path in _files(directory)}
    if "tokenizer.json" in names:
        return ()
    for name in _MODELS:
        if name in names and _damage(directory / name) is None:
            return ("tiktoken",) if _TIKTOKEN.match(_head(directory / name)) else ("sentencepiece", "protobuf")
    return ("mistral-common",) if "tekken.json" in names else ()


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor the package that it would be in
        return False


def _damage(path: Path) -> str | None:
    """What is wrong with a file as it is, whatever is read from it."""
    try:
        if path.suffix == ".json":
            read_json_object(path)
        else:
            _head(path)
    except FlexMoEError as error:
        return str(error)
    return None


def _head(path: Path) -> bytes:
    with open_file(path) as (descriptor, size):
        return read_bytes(descriptor, min(size, _HEAD_BYTES))
