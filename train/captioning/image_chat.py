"""What a Qwen-VL is asked with, of pictures alone: its processor in transformers is not made without torchvision, which
only its videos need.
"""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature


@dataclass
class ImageChat:
    """A tokenizer with its chat template, and what cuts pictures into patches."""

    tokenizer: Any
    image_processor: Any
    token: str
    """Of the model: where a picture stands in the text."""

    @property
    def chat_template(self) -> str | None:
        template: str | None = self.tokenizer.chat_template
        return template

    def apply_chat_template(self, conversation: list[Any], **options: Any) -> str:
        text: str = self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        return text

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(ids, **options)
        return texts

    def __call__(self, images: list[list[Image.Image]], text: list[str], **options: Any) -> BatchFeature:
        """The model's inputs of one picture a text. options: the tokenizer's, with `return_tensors="pt"`.

        The picture's place in the text becomes as many as the model has tokens for it: a token is a square of
        `merge_size` patches.
        """
        seen = self.image_processor(images=[own for (own,) in images], return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist()
        whole = [each.replace(self.token, self.token * count, 1) for each, count in zip(text, counts, strict=True)]
        words = self.tokenizer(whole, **options)
        kinds = (words["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.token)).int()
        return BatchFeature({**words, **seen, "mm_token_type_ids": kinds})


def load_image_chat(name: str, token_id: int) -> ImageChat:
    """Of the Hub or a folder; token_id: the model's image_token_id."""
    tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    eye: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    return ImageChat(tokenizer, eye, tokenizer.convert_ids_to_tokens(token_id))
