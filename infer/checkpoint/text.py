"""A checkpoint's text encoders with their tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infer.checkpoint.checks import check_words
from infer.checkpoint.family import family_of
from infer.checkpoint.files import part_folder, read_config
from infer.checkpoint.load import load_part
from infer.checkpoint.load_errors import loading
from infer.checkpoint.model import Model
from infer.checkpoint.random_weights import shape_tokenizer
from infer.checkpoint.sources import rest_of
from infer.quantize.precision import Precision

if TYPE_CHECKING:
    import torch


def load_text_parts(model: Model, precision: Precision, device: torch.device, whole: bool = False) -> dict[str, Any]:
    """The text encoders with their tokenizers, by their names in the pipeline; the large one at the precision's `t5`.

    whole: with what nothing reads, as it is saved.

    Raises:
        ValueError: an encoder is not one that the family reads.
    """
    import torch
    import transformers

    from infer.quantize.compute import NAMES, compute_dtype, compute_wide, small_dtype, stored_on

    family = family_of(model)
    large, small = stored_on(precision.for_t5(), device), Precision(NAMES[small_dtype(device)])
    parts: dict[str, Any] = {}
    for part, _, quantized in family.ENCODERS:
        try:
            cls, config = family.text_class(part, read_config(model, part), whole)
        except ValueError as error:
            raise ValueError(f"the {part} of {model.path} {error}") from error
        wanted = large if quantized else small
        loaded = load_part(model, part, cls, transformers, wanted, device, config=config)
        if compute_dtype(wanted.dtype, device) == torch.float16 and not loaded._keep_in_fp32_modules:
            compute_wide(loaded)
        parts[part] = loaded if whole else family.text_body(loaded)
    for part, name, _ in family.ENCODERS:
        if model.random:
            parts[name] = shape_tokenizer(model.path, name)
            continue
        rest = rest_of(model)
        with loading(rest.path, rest.local is not None, name):
            folder = part_folder(model, name)
            parts[name] = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        check_words(model.path, name, parts[name], parts[part])
    return parts
