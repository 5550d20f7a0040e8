"""A completion ends with the first token after which its whole text holds a stop string, however the tokens were made."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flexmoe.sampling.stop_strings import StopStrings
from tests.support.tokenizers import SENTENCES

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "größe",
    "日本語",
    "🙂🙃",
    "a<b>c</b>",
    "\n\n",
    "```",
    "naïve",
    "👩\u200d👩\u200d👧",
    "end",
)


def byte_level():
    """Ids are pieces of UTF-8: a character may take several of them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def byte_fallback():
    """Llama's way: a space before words, none at the very beginning, and bytes for what is not in the vocabulary."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)}
    pieces = [
        "<unk>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyz<>/`",
        "▁the",
        "▁quick",
        "▁brown",
        "▁fox",
        "th",
        "ow",
        "▁e",
        "nd",
    ]
    vocab |= {piece: 256 + i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("o", "w"), ("n", "d"), ("▁", "e")]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def word_piece():
    """BERT's way: pieces are joined to the word before, and no id reads alone as it reads after others."""
    pieces = [
        "[UNK]",
        *"abcdefghijklmnopqrstuvwxyz<>/`",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        "the",
        "fox",
    ]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    return backend


TOKENIZERS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "word-piece": word_piece}


@pytest.fixture(scope="module", params=TOKENIZERS)
def backend(request):
    return TOKENIZERS[request.param]()


def by_definition(stops, detokenize, ids, after=0):
    """(ids, text, stop string) at the first token after which the whole text holds one that ends behind the first ids."""
    passed = detokenize(ids[:after]).rstrip("\ufffd") if after else ""
    for count in range(after + 1, len(ids) + 1):
        text = detokenize(ids[:count])
        found = [
            (at, number)
            for number, stop in enumerate(stops)
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > len(passed)
        ]
        if found:
            at, number = min(found)
            return count, text[:at], stops[number]
    return None


def incrementally(stops, detokenize, ids, **options):
    watch = StopStrings(stops, detokenize, **options)
    for count in range(1, len(ids) + 1):
        found = watch.find(ids[:count])
        if found:
            return (count, *found)
    return None


@pytest.mark.parametrize("seed", range(30))
def test_what_is_found_is_what_the_whole_text_says(backend, seed):
    rng = random.Random(seed)
    text = " ".join(rng.choice(WORDS) for _ in range(rng.choice((3, 30, 120))))
    ids = backend.encode(text).ids
    for at in rng.sample(range(len(ids)), min(len(ids), rng.choice((0, 2, 20)))):
        ids[at] = rng.randrange(backend.get_vocab_size())  # characters cut in two, pieces in the wrong place
    whole = backend.decode(ids)
    stops = []
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, len(whole)))
        stops.append(whole[at : at + rng.choice((1, 2, 5, 40))] or "x")
    if rng.random() < 0.3:
        stops = ["not there", *stops]
    assert incrementally(tuple(stops), backend.decode, ids) == by_definition(stops, backend.decode, ids)


@pytest.mark.parametrize("seed", range(30))
def test_what_ends_among_the_first_tokens_is_no_stop_string(backend, seed):
    rng = random.Random(seed)
    words = [rng.choice(WORDS) for _ in range(rng.choice((5, 40, 120)))]
    ids = backend.encode(" ".join(words)).ids
    stops, after = (rng.choice(words), rng.choice(words)[:2]), rng.randrange(1, len(ids))
    expected = by_definition(stops, backend.decode, ids, after)
    assert incrementally(stops, backend.decode, ids, after=after) == expected
    included = incrementally(stops, backend.decode, ids, after=after, included=True)
    assert included == (expected and (expected[0], expected[1] + expected[2], expected[2]))


def test_stop_string_is_found_across_tokens_and_in_the_middle_of_one():
    backend = byte_level()
    ids = backend.encode("hello world").ids
    assert incrementally(("lo wo",), backend.decode, ids)[1:] == ("hel", "lo wo")
    assert incrementally(("orl",), backend.decode, ids) == (len(ids), "hello w", "orl")


def test_character_of_several_tokens_is_found_when_it_is_whole():
    backend = byte_level()
    ids = backend.encode("abc🙂def").ids
    count, text, stop = incrementally(("🙂",), backend.decode, ids)
    assert (backend.decode(ids[:count]), text, stop) == ("abc🙂", "abc", "🙂")


def test_first_of_several_stop_strings_in_the_text_ends_it_and_of_two_at_one_place_the_first_given():
    def text(ids):
        return "".join("abcdef"[i] for i in ids)

    assert incrementally(("de", "cd"), text, [0, 1, 2, 3, 4]) == (4, "ab", "cd")
    watch = StopStrings(("bcd", "b", "bc"), text)
    assert watch.find([0, 1, 2, 3]) == ("a", "bcd")


@pytest.mark.parametrize(
    "text_of_ids", [lambda ids: "x" * len(ids), lambda ids: "", lambda ids: "\ufffd"], ids=["long", "none", "one"]
)
def test_cost_of_a_long_completion_is_far_below_the_square_of_its_length(text_of_ids):
    decoded = 0

    def detokenize(ids):
        nonlocal decoded
        decoded += len(ids)
        return text_of_ids(ids)

    watch, count = StopStrings(("stop",), detokenize), 3000
    for length in range(1, count + 1):
        assert watch.find(range(length)) is None
    if text_of_ids(range(2)) == "xx":
        assert decoded < 150 * count, "a window of about a hundred ids, and the whole text every fifty"
