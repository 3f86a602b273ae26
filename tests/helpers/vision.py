"""A tiny LLaVA, its processor, and preferences about pictures."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset
from PIL import Image
from tokenizers import AddedToken
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from helpers.worlds import WORDS, made, make_config, make_tokenizer

SIDE, PATCH = 8, 4
VISION_HOOK_POINT = "language_model.layers.1"

TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }} {% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def make_vision_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_processor() -> LlavaProcessor:
    pictures = LlavaImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
    )
    return LlavaProcessor(
        pictures,
        make_vision_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_llava(tokenizer: Any = None, seed: int = 0) -> nn.Module:
    tokenizer = make_vision_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=make_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return made(LlavaForConditionalGeneration, config, seed)


def picture_pairs(n: int) -> Dataset:
    rng = random.Random(0)

    def said(role: str, *, shown: bool = False) -> list[dict[str, Any]]:
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 6)))
        picture = [{"type": "image", "text": None}] if shown else []
        return [{"role": role, "content": [*picture, {"type": "text", "text": text}]}]

    def picture() -> Image.Image:
        return Image.effect_noise((SIDE, SIDE), rng.randint(10, 90)).convert("RGB")

    rows = [
        {
            "images": [picture()],
            "prompt": said("user", shown=True),
            "chosen": said("assistant"),
            "rejected": said("assistant"),
        }
        for _ in range(n)
    ]
    return Dataset.from_list(rows)
