"""Whether what was loaded is a whole checkpoint: both libraries fill in what is absent, with a warning at most."""

from collections.abc import Mapping
from typing import Any

from infer.quantize.precision import DTYPES, Precision


def check_whole(path: str, part: str, found: dict[str, Any]) -> None:
    """Both libraries fill in at random what a file of weights lacks, with a warning."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"cannot load the {part} of {path}: its files lack {len(missing)} tensors ({missing[0]}, ...); copy "
            "the checkpoint again"
        )


def check_stored(path: str, stored: dict[str, Any], precision: Precision, part: str) -> None:
    """What a quantized checkpoint was saved with cannot be changed by loading it: refuse what says otherwise."""
    kind = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type")
    if precision.layers or precision.kind != kind:
        other = "a mixture of kinds" if precision.layers else precision.kind
        mend = f"precision={kind} without precision.layers" if part == "transformer" else f"precision.t5={kind}"
        raise ValueError(
            f"the {part} of {path} is stored as {kind}, and {other} is asked for; set {mend}, or load an unquantized "
            "checkpoint"
        )
    asked = {
        "bnb_4bit_use_double_quant": ("double_quant", precision.double_quant, ("nf4", "fp4")),
        "bnb_4bit_compute_dtype": ("compute_dtype", DTYPES[precision.dtype_name], ("nf4", "fp4")),
        "llm_int8_threshold": ("outlier_threshold", precision.outlier_threshold, ("int8",)),
    }
    if precision.dtype_name == "fp16":
        del asked["bnb_4bit_compute_dtype"]  # weights are dequantized to fp16 whatever that says
    for key, (name, value, kinds) in asked.items():
        if precision.kind in kinds and key in stored and stored[key] != value:
            raise ValueError(
                f"{path} was quantized with {key}={stored[key]}, but precision.{name} asks for {value}; "
                f"set precision.{name} to what it was saved with, or load the unquantized checkpoint"
            )


def check_axes(path: str, config: Mapping[str, Any]) -> None:
    """The rotary embedding's widths in a transformer's config, which nothing looks at before the first picture.

    Raises:
        ValueError: they do not fill a head.
    """
    axes, width = list(config.get("axes_dims_rope", (16, 56, 56))), config.get("attention_head_dim", 128)
    if len(axes) != 3 or sum(axes) != width or any(axis % 2 for axis in axes):
        raise ValueError(
            f"config.json of the transformer of {path} has axes_dims_rope={axes}, which are not three even numbers "
            f"whose sum is attention_head_dim={width}; copy the checkpoint again"
        )


def check_words(path: str, name: str, tokenizer: Any, encoder: Any) -> None:
    """The tokenizer's words: without its files transformers makes one that knows none.

    Raises:
        ValueError: it has less than half of those that the encoder embeds.
    """
    words, wanted = len(tokenizer), encoder.config.vocab_size
    if words < wanted / 2:
        raise ValueError(
            f"the {name} of {path} knows {words} of its encoder's {wanted} words; copy the checkpoint again"
        )
