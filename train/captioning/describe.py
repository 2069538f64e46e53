"""A vision-language model of transformers that describes pictures: Florence-2, or one that is asked in a chat, as
Qwen-VL."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from train.captioning.image_chat import load_image_chat

TASK = "<MORE_DETAILED_CAPTION>"  # Florence-2's own prompt for a paragraph
QUESTION = "Describe this picture in two sentences: what is in it, where, and in which light and style."


@dataclass
class Captioner:
    """A model with its processor."""

    model: Any
    processor: Any

    @property
    def chats(self) -> bool:
        """Whether it is asked by a chat template; else it is a Florence-2."""
        return bool(self.model.config.model_type != "florence2")


def load_captioner(name: str, device: torch.device) -> Captioner:
    """A captioner from the Hub or a folder, in bf16 (fp16 on a card without it), in fp32 on a CPU.

    Raises:
        ValueError: it cannot be loaded, or is of another kind.
    """
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type.startswith("qwen") and find_spec("torchvision") is None:
            processor: Any = load_image_chat(name, config.image_token_id)
        else:
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"captioner {name!r} cannot be loaded ({reason}); give the Hub id or folder of a Florence-2 or Qwen-VL "
            "in transformers' own format, such as florence-community/Florence-2-large or Qwen/Qwen2.5-VL-3B-Instruct"
        ) from error
    captioner = Captioner(model.to(device).eval(), processor)
    if captioner.chats and not getattr(processor, "chat_template", None):
        raise ValueError(f"captioner {name!r} is a {model.config.model_type} without a chat template; choose another")
    return captioner


@torch.no_grad()
def describe(captioner: Captioner, pictures: list[Image.Image], prompt: str | None, tokens: int) -> list[str]:
    """A caption for each picture, the most likely words each time.

    prompt: None for the model's own. tokens: at most so many of each caption.
    """
    processor, model = captioner.processor, captioner.model
    if captioner.chats:
        processor.tokenizer.padding_side = "left"  # what is generated follows the question
        asked = [{"type": "image"}, {"type": "text", "text": prompt or QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    else:
        text = prompt or TASK
    given = processor(
        images=[[picture] for picture in pictures] if captioner.chats else pictures,
        text=[text] * len(pictures),
        padding=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    found = model.generate(**given, max_new_tokens=tokens, do_sample=False, num_beams=1 if captioner.chats else 3)
    if captioner.chats:
        found = found[:, given["input_ids"].shape[1] :]
    return [" ".join(each.split()) for each in processor.batch_decode(found, skip_special_tokens=True)]
