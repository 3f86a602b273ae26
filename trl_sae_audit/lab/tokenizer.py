"""The word-level tokenizer of the lab's language."""

from transformers import PreTrainedTokenizerFast

from .language import vocabulary
from .wording import BOS, EOS, PAD, UNKNOWN


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer, without any download.

    One word or punctuation mark is one token, whatever the spacing, so a prompt's tokens are always a prefix
    of those of prompt and answer together. Text begins with `<bos>`, as Llama's and Gemma's does, and TRL's
    trainers append `<eos>`. There is no chat template: the language is plain text.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex(r"\w+|[^\w\s]"), "isolated")])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
