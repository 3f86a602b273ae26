"""The model of this folder is one that a dictionary can be trained on in seconds."""

from __future__ import annotations

import pytest
from helpers.sae_training import make_narrow_model
from helpers.worlds import make_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_narrow_model()
