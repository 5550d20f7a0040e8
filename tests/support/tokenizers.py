"""Small tokenizers, trained on a few sentences."""

SENTENCES = ["the quick brown fox jumps over the lazy dog", "weights travel from disk to host to device", "hello world"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def build_tokenizer(directory, chat_template=TEMPLATE, vocab_size=320):
    """A byte-level BPE with BOS added to plain prompts, saved as a checkpoint would hold it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    fast.chat_template = chat_template
    fast.save_pretrained(directory)


def build_sentencepiece(directory):
    """A tokenizer of Mixtral's kind: words begin with a space that a text does not, and unknown characters are bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
    ]
    merges = [("▁", "h"), ("l", "l"), ("▁", "w"), ("▁h", "e"), ("ll", "o"), ("▁he", "llo"), ("▁w", "o"), ("r", "l")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(directory)


#: As Qwen3's: `<think>` is a token that texts show.
THINK_TOKENS = (("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False), ("</think>", False))
#: As gpt-oss's.
HARMONY_TOKENS = tuple(
    (f"<|{name}|>", True) for name in ("start", "end", "message", "channel", "return", "call", "constrain")
)
#: The assistant's answer begins with the thinking, or with an empty one.
THINK_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
HARMONY_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def build_reasoning_tokenizer(directory, tokens, chat_template):
    """The byte-level BPE with tokens of its own for marks.

    Args:
        tokens: each with whether it is special, and so left out of texts.
    """
    from transformers import AddedToken, AutoTokenizer

    build_tokenizer(directory, chat_template)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([AddedToken(text, special=special) for text, special in tokens])
    tokenizer.save_pretrained(directory)
