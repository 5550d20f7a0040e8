"""The text that ships with the repository, for prompts that look like language."""

from pathlib import Path

CORPUS = Path(__file__).with_name("corpus.txt")


def corpus_words() -> list[str]:
    """The words of the text, in order."""
    return CORPUS.read_text(encoding="utf-8").split()
