"""Tokenizers without a chat template, and a template with generation marks."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hfsft.data.tasks import facts

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}<|end|>{% endif %}{% endfor %}"
)


def plain_bpe(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens without a chat template, `special` among them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(facts()[:300], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
