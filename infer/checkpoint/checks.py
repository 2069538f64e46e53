"""Checks that a checkpoint is whole and fits the settings: both libraries fill in absent tensors and only warn."""

from collections.abc import Callable, Mapping
from typing import Any

from infer.family.find import of_config
from infer.quantize.precision import DTYPES, Precision


def check_whole(path: str, part: str, found: dict[str, Any]) -> None:
    """Refuse a part whose files lack tensors, which both libraries fill in at random with a warning.

    Raises:
        ValueError: tensors are missing.
    """
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"cannot load the {part} of {path}: its files lack {len(missing)} tensors ({missing[0]}, ...); copy "
            "the checkpoint again"
        )


def check_stored(path: str, stored: dict[str, Any], precision: Precision, part: str) -> None:
    """Refuse settings that differ from those of a stored quantized checkpoint: loading cannot change them.

    Raises:
        ValueError: the kind or another setting of the precision differs.
    """
    if not isinstance(stored, dict):
        raise ValueError(
            f"quantization_config in config.json of the {part} of {path} is {stored!r}, and no object; copy it again"
        )
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
    own = of_config(config).AXES
    axes, width = list(config.get("axes_dims_rope", own)), config.get("attention_head_dim", 128)
    if len(axes) != len(own) or sum(axes) != width or any(axis % 2 for axis in axes):
        raise ValueError(
            f"config.json of the transformer of {path} has axes_dims_rope={axes}, which are not {len(own)} even "
            f"numbers whose sum is attention_head_dim={width}; copy the checkpoint again"
        )


def check_channels(path: str, transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> None:
    """Compare the channels that a transformer takes with those of the autoencoder's packed latents, by their configs.

    Raises:
        ValueError: it takes others: those of a mask, or of a control picture, which nothing here gives it.
    """
    taken, given = transformer.get("in_channels"), autoencoder.get("latent_channels")
    if isinstance(given, int) and isinstance(taken, int) and taken != 4 * given:
        raise ValueError(
            f"the transformer of {path} takes {taken} channels where its autoencoder gives {4 * given}: Fill, Control "
            "and other models with further inputs are not taken here; choose a text-to-image checkpoint"
        )


def check_embeds(
    path: str,
    part: str,
    width: Callable[[Mapping[str, Any]], int],
    encoder: Mapping[str, Any],
    transformer: Mapping[str, Any],
) -> None:
    """Compare the width of a text encoder's embeddings with what the transformer reads, by their configs.

    Raises:
        ValueError: they differ, or the encoder's config does not say.
    """
    try:
        given = width(encoder)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"config.json of the {part} of {path} lacks {error}; copy the checkpoint again") from error
    if given != transformer.get("joint_attention_dim", given):
        raise ValueError(
            f"the {part} of {path} gives embeddings of width {given} where its transformer reads "
            f"{transformer['joint_attention_dim']}: it is another model's; copy the checkpoint again"
        )


def check_words(path: str, name: str, tokenizer: Any, encoder: Any) -> None:
    """The tokenizer's words: without its files transformers makes one that knows none.

    Raises:
        ValueError: it has less than half of those that the encoder embeds.
    """
    words, wanted = len(tokenizer), encoder.config.get_text_config().vocab_size
    if words < wanted / 2:
        raise ValueError(
            f"the {name} of {path} knows {words} of its encoder's {wanted} words; copy the checkpoint again"
        )
