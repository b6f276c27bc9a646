"""Tokenizers that put special tokens around a text, each in its own way."""

from families import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2


def adding(template: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a post-processor: "<bos> $A" puts <bos> in front of every text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<pad>", PAD), ("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer
