"""A preflight's worker whose tokenizer crashes or hangs on prompts that ask for it, and starts at once: it has no vocabulary."""

import os
import time

from flexmoe.preflight.worker import start
from flexmoe.preflight.worker_pool import serve
from flexmoe.text.tokenizer import Tokenizer


def encode_all(self, texts, **options):
    if "die" in texts:
        os.kill(os.getpid(), 9)
    if "hang" in texts:
        time.sleep(600)
    return [(5,) * len(text) for text in texts]


if __name__ == "__main__":
    Tokenizer.encode_all = encode_all
    serve(start)
