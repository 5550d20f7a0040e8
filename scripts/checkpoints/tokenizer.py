"""A real byte-level BPE tokenizer for synthetic checkpoints, with Mixtral's kind of chat template.

It is trained on the text that is in the repository, so that a demo needs no download: any text survives a round trip,
and English and Python take a few characters a token.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flexmoe.errors import UsageError
from scripts.support.corpus import CORPUS

_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
_SMALLEST_VOCAB = 256 + len(_SPECIAL_TOKENS)
_LARGEST_TOKENIZER = 8192  # the text at hand gives no more useful merges than this
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)


def check_vocab_size(vocab_size: int) -> None:
    """Refuses a model's vocabulary that no tokenizer of ours fits in.

    Raises:
        UsageError: it has no room for every byte and the special tokens.
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise UsageError(
            f"a vocabulary of {vocab_size} cannot hold the {_SMALLEST_VOCAB} bytes and special tokens of a "
            f"tokenizer: enlarge it, or leave the tokenizer out"
        )


def train_tokenizer(vocab_size: int, max_position: int) -> PreTrainedTokenizerFast:
    """Trains on the text at hand; the same text gives the same tokenizer.

    Args:
        vocab_size: of the model; the tokenizer has at most as many tokens.
        max_position: the longest context of the model, in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, _LARGEST_TOKENIZER),
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", _SPECIAL_TOKENS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=max_position,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _training_texts() -> list[str]:
    """The prose that ships with the repository, and its own documents and sources in a fixed order."""
    root = CORPUS.resolve().parents[2]
    files = [CORPUS, *sorted(root.glob("*.md"))]
    for package in ("policies", "cost_model", "flexmoe", "scripts"):
        files += sorted((root / package).rglob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files if file.is_file()]
