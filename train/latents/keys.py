"""What everything in the cache is found by: a hash of all that its encoding depends on, and of nothing else."""

import hashlib
import json
from dataclasses import dataclass

from infer.checkpoint.family import family_of
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.model import Model
from infer.quantize.eight_bit_products import without_products
from infer.quantize.precision import Precision
from train.data.view import View


@dataclass(frozen=True)
class Keys:
    """The part of the keys that one model and config give."""

    vae: str
    """The autoencoder's weights and dtype."""
    tile: int
    """Longest side that it takes whole, 0 for any."""
    encoders: str
    """The text encoders and their tokenizers, the large one's precision and the text's length."""

    def picture(self, identity: str, view: View) -> str:
        """Of a view of a picture with these pixels."""
        tile = self.tile if 0 < self.tile < max(view.height, view.width) else 0
        return _hash("picture", identity, *_transform(view), self.vae, tile)

    def mask(self, identity: str, view: View) -> str:
        """Of a view of a mask with these pixels."""
        return _hash("mask", identity, *_transform(view))

    def text(self, text: str) -> str:
        return _hash("prompt", text, self.encoders)


def make_keys(model: Model, precision: Precision, length: int | None, tile: int) -> Keys:
    """Reads all weights that a key depends on. length: the text's, None for the checkpoint's own."""
    encoders = family_of(model).ENCODERS
    names = [encoder.part for encoder in encoders] + [encoder.tokenizer for encoder in encoders]
    parts = [fingerprint(model, part) for part in names]
    text = _hash(parts, without_products(precision.for_t5()), length)
    return Keys(_hash(fingerprint(model, "vae"), "bfloat16"), tile, text)


def _transform(view: View) -> tuple[object, ...]:
    return "lanczos", view.height, view.width, view.box, view.flip


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
