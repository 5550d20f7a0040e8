"""JSON Schema's public test suite: what a library does with each schema, and with texts of each instance.

An instance has many texts: properties in any order, strings with characters escaped or not. A valid one is *producible* where one of
them is accepted, and an invalid one *wrong* where one is. Beside the suite's own instances each schema that is compiled writes
some texts at random, which are validated by the `jsonschema` package: one that is not valid is wrong, too.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scripts.structured.libraries import Library, Matcher, RefusedError

MOST_TEXTS, WALKS, WALK_BYTES = 200, 40, 400
_ENDING = b'"}]'


@dataclass(slots=True)
class Counts:
    """Instances of one keyword, or of all.

    Attributes:
        right: valid ones that are accepted, invalid ones that are not.
        stricter: valid ones of which no text is accepted.
        wrong: invalid ones that are accepted.
        refused: of schemas that are not compiled.
        walks: texts written at random, and those of them that are not valid.
    """

    tests: Counter[str] = field(default_factory=Counter)
    walks: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the bytes, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: id for id, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def texts(value: Any) -> Iterator[str]:
    """Texts of a JSON value, in several orders of properties and with characters escaped or not."""
    if isinstance(value, dict):
        for order in itertools.islice(itertools.permutations(value), 24):
            inner = [list(itertools.islice(texts(value[key]), 6)) for key in order]
            names = [json.dumps(key, ensure_ascii=False) for key in order]
            for items in itertools.islice(itertools.product(*inner), 50):
                yield "{" + ",".join(map(":".join, zip(names, items))) + "}"
            escaped = ["".join(f"\\u{ord(c):04x}" for c in key) for key in order]
            yield "{" + ",".join(f'"{name}":{items[0]}' for name, items in zip(escaped, inner)) + "}"
    elif isinstance(value, list):
        inner = [list(itertools.islice(texts(item), 6)) for item in value]
        yield from ("[" + ",".join(items) + "]" for items in itertools.islice(itertools.product(*inner), 50))
    else:
        yield json.dumps(value, ensure_ascii=False)
        if isinstance(value, str):
            yield json.dumps(value)
            yield '"' + "".join(f"\\u{ord(c):04x}" for c in value if ord(c) < 0x10000) + '"'
        if isinstance(value, float) and value.is_integer():
            yield str(int(value))


def cover(library: Library, tokenizer: Any, suite: Path) -> dict[str, Counts]:
    """What the library does with the suite, by keyword."""
    found = {}
    for path in sorted(suite.glob("*.json")):
        counts = found[path.stem] = Counts()
        for group in json.loads(path.read_text(encoding="utf-8")):
            try:
                library.matcher(group["schema"])
            except RefusedError as error:
                counts.tests["refused"] += len(group["tests"])
                counts.reasons[str(error)[:120]] += 1
                continue
            _instances(library, tokenizer, group, counts, path.stem)
            _walks(library, tokenizer, group, counts, path.stem)
    return found


def _instances(library: Library, tokenizer: Any, group: dict, counts: Counts, keyword: str) -> None:
    for test in group["tests"]:
        accepted = next(
            (
                text
                for text in itertools.islice(texts(test["data"]), MOST_TEXTS)
                if _accepts(library, tokenizer, group, text)
            ),
            None,
        )
        if test["valid"]:
            counts.tests["right" if accepted is not None else "stricter"] += 1
            continue
        counts.tests["right" if accepted is None else "wrong"] += 1
        if accepted is not None:
            counts.wrong.append(f"{keyword}: {group['description']}: {test['description']}: {accepted[:80]}")


def _accepts(library: Library, tokenizer: Any, group: dict, text: str) -> bool:
    matcher = library.matcher(group["schema"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return all(matcher.take(id) for id in ids) and matcher.may_end()


def _walks(library: Library, tokenizer: Any, group: dict, counts: Counts, keyword: str) -> None:
    for seed in range(WALKS):
        text = _walk(library.matcher(group["schema"]), tokenizer, random.Random(seed))
        if text is None:
            counts.walks["unfinished"] += 1
            continue
        valid = _is_valid(text, group["schema"])
        counts.walks["valid" if valid else "invalid"] += 1
        if not valid:
            counts.wrong.append(f"{keyword}: {group['description']}: written at random: {text[:80]}")


def _walk(matcher: Matcher, tokenizer: Any, rng: random.Random) -> str | None:
    """A text at random; None where it has no end after so many bytes."""
    ids: list[int] = []
    ending = {tokenizer.convert_tokens_to_ids(chr(byte)) for byte in _ENDING}
    end = tokenizer.eos_token_id
    while len(ids) < WALK_BYTES:
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[: len(tokenizer)]
        permitted = np.flatnonzero(bits).tolist()
        may_end, others = end in permitted, [id for id in permitted if id != end]
        if may_end and (not others or rng.random() < 0.3):
            return str(tokenizer.decode(ids))
        likely = [id for id in others if id in ending]
        token = rng.choice(likely if likely and rng.random() < 0.3 else others) if others else None
        if token is None or not matcher.take(token):
            return None
        ids.append(token)
    return None


def _is_valid(text: str, schema: Any) -> bool:
    """Whether a text is valid with numbers as floats or as they are written: 782.627 is a multiple of 0.0001, its float is none."""
    try:
        value, exact = json.loads(text), json.loads(text, parse_float=Decimal)
    except ValueError:
        return False
    return _validates(value, schema) or _validates(exact, json.loads(json.dumps(schema), parse_float=Decimal))


def _validates(value: Any, schema: Any) -> bool:
    try:
        jsonschema.Draft202012Validator(schema).validate(value)
    except jsonschema.ValidationError:
        return False
    except Exception:  # the schema refers to what the validator does not have; the library's refusals tell of those
        return True
    return True
