"""FLUX.2's text encoder: Qwen3 of klein, Mistral of dev, of which a few layers are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from infer.family.family import Linear, Text, TextSize

LAYERS = {"qwen3": (9, 18, 27), "mistral3": (10, 20, 30)}
"""The hidden states of the text encoder that the transformer reads, behind each other. diffusers' training script for
klein takes Mistral's for Qwen3 by default, which its pipeline does not (diffusers issue 13445)."""


def text_class(part: str, config: dict[str, Any], whole: bool) -> tuple[Any, Any]:
    """Qwen3 and Mistral without their language-model head, and without the layers above those that are read."""
    import transformers

    kind = config.get("model_type")
    if kind not in LAYERS:
        raise ValueError(f"is of the kind {kind!r}; FLUX.2 reads {' or '.join(LAYERS)}")
    cls = transformers.Qwen3Model if kind == "qwen3" else transformers.Mistral3Model
    own = cls.config_class.from_dict(copy.deepcopy(config))
    text = own.get_text_config()
    last = LAYERS[kind][-1]
    if text.num_hidden_layers < last:
        raise ValueError(f"has {text.num_hidden_layers} layers, of which FLUX.2 reads number {last}; copy it again")
    if not whole and text.num_hidden_layers > last:
        text.num_hidden_layers = last
        text.layer_types = None if getattr(text, "layer_types", None) is None else text.layer_types[:last]
        # the last layer's output as it is: by itself transformers puts the final norm's in its place
        text.tie_last_hidden_states = False
    return cls, own


def text_size(part: str, config: Mapping[str, Any]) -> TextSize:
    text = config.get("text_config", config)
    width, hidden, head = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    asked, shared = (head * text[f"num_{name}_heads"] for name in ("attention", "key_value"))
    block = [Linear(asked, width), Linear(width, asked), *[Linear(shared, width)] * 2]
    block += [*[Linear(hidden, width)] * 2, Linear(width, hidden)]
    return TextSize(block * LAYERS[config["model_type"]][-1], text["vocab_size"] * width, 0)


def embeds_width(config: Mapping[str, Any]) -> int:
    return len(LAYERS["qwen3"]) * int(config.get("text_config", config)["hidden_size"])


def text_body(encoder: Any) -> Any:
    """What encodes. Without the final norm where its layers were cut: transformers 5.17 knows no such setting."""
    from torch import nn

    body = getattr(encoder, "language_model", encoder)
    if getattr(body.config, "tie_last_hidden_states", None) is False:
        body.norm = nn.Identity()
    return body


def text_length(parts: Mapping[str, Any]) -> int:
    return min(512, int(parts["tokenizer"].model_max_length))  # published tokenizers know no limit, or a far one


def make_encoder(parts: Mapping[str, Any], length: int) -> Callable[[str], Text]:
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
    qwen = encoder.config.model_type == "qwen3"
    embed = Flux2KleinPipeline._get_qwen3_prompt_embeds if qwen else Flux2Pipeline._get_mistral_3_small_prompt_embeds

    layers = list(LAYERS["qwen3" if qwen else "mistral3"])

    import torch

    # by itself they are rounded to what is stored, and hidden states may be larger than fp16 goes
    dtype = torch.float32 if encoder.dtype == torch.float16 else None

    def encode(prompt: str) -> Text:
        found = embed(
            encoder, tokenizer, [prompt], dtype=dtype, max_sequence_length=length, hidden_states_layers=layers
        )
        return Text(found[0], None)

    return encode


def count_tokens(parts: Mapping[str, Any], prompts: list[str]) -> list[int]:
    """With what the chat template puts around them."""
    from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input

    tokenizer = parts["tokenizer"]
    qwen = "thinking" in str(getattr(tokenizer, "chat_template", ""))
    if qwen:
        asked: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts]
        how: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
    else:
        asked, how = format_input(prompts, SYSTEM_MESSAGE), {"add_generation_prompt": False}
    texts = [tokenizer.apply_chat_template(messages, tokenize=False, **how) for messages in asked]
    # Mistral's template writes the mark of a text's beginning itself
    return [len(ids) for ids in tokenizer(texts, verbose=False, add_special_tokens=qwen).input_ids]
