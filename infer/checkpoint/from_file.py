"""Parts of a checkpoint loaded from single files, tensor by tensor: two of them in host memory at most."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from infer.checkpoint.checks import check_whole
from infer.checkpoint.files import read_config
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.model import Model
from infer.checkpoint.sources import rest_of
from infer.family.find import of_config
from infer.program.note import note
from infer.quantize.precision import Precision
from infer.quantize.quantizer import LayerQuantizer, quantization_config, quantizing_on
from infer.single_file.rounding import rounded_twice
from infer.single_file.weights import Unread, Weights, autoencoder_weights, text_weights, transformer_weights


def transformer_from_file(
    model: Model, file: Path, precision: Precision, device: torch.device, hold: torch.device
) -> Any:
    """The transformer, each tensor dequantized and quantized on `device` and held on `hold`; says where the other
    parts are from, and what rounding twice costs.

    Raises:
        ValueError: the file does not hold all of it.
    """
    import diffusers
    from accelerate import init_empty_weights
    from diffusers.models.model_loading_utils import load_model_dict_into_meta

    config = read_config(model, "transformer")
    weights = transformer_weights(file, config, device)
    _tell(model, file, weights, precision)
    with init_empty_weights():
        made: Any = getattr(diffusers, of_config(config).TRANSFORMER).from_config(config)
    check_whole(str(file), "transformer", {"missing_keys": made.state_dict().keys() - weights.keys()})
    quantizer = None
    if precision.quantized:
        with quantizing_on(device, hold):  # which sees that the device can
            wanted = quantization_config(precision, diffusers, linear_shapes(config))
        quantizer = LayerQuantizer(wanted, device, hold, pre_quantized=False)
        made.register_to_config(quantization_config=wanted)  # as from_pretrained does: it is saved with the weights
        quantizer.preprocess_model(model=made, device_map={"": hold}, keep_in_fp32_modules=[])
    # in one call, which asks for the state of the whole model once; each tensor is read as it comes to it
    load_model_dict_into_meta(made, weights, dtype=precision.dtype, hf_quantizer=quantizer, device_map={"": hold})
    if quantizer is not None:
        quantizer.postprocess_model(made)
        made.hf_quantizer = quantizer
    made.register_to_config(_name_or_path=model.path)
    return made


def _tell(model: Model, file: Path, weights: Weights, precision: Precision) -> None:
    if model.parts is None:
        note(f"what {file.name} lacks is of {rest_of(model).path}; model.parts names another")
    kinds = [weights.kind(name) for name in weights if name.endswith(".weight") and weights.rank(name) == 2]
    lost = rounded_twice(file.name, kinds, precision)
    if lost is not None:
        note(lost)


def text_from_file(
    model: Model,
    part: str,
    file: Path,
    cls: Any,
    config: Any,
    precision: Precision,
    device: torch.device,
    hold: torch.device,
) -> Any:
    """A text encoder of transformers, its language model alone where it has eyes too; config: None for its own.

    Raises:
        ValueError: the file does not hold all of it.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    stored = {name: value for name, value in read_config(model, part).items() if name != "quantization_config"}
    config = config or cls.config_class.from_dict(stored)
    text = config.get_text_config()
    if text is not config:
        cls, config = MODEL_MAPPING[type(text)], text
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        names = list(cls(config).state_dict())
    family = of_config(read_config(model, "transformer"))
    weights = text_weights(file, family, part, stored, names, device)
    wanted = quantization_config(precision, transformers)
    with quantizing_on(device, hold) if wanted else nullcontext():
        loaded, found = cls.from_pretrained(
            None,
            config=config,
            state_dict={name: Unread(weights, name) for name in weights},
            quantization_config=wanted,
            device_map={"": hold},
            dtype=precision.dtype,
            output_loading_info=True,
        )
    check_whole(str(file), part, found)
    return loaded


def autoencoder_from_file(model: Model, file: Path, dtype: torch.dtype) -> Any:
    """The autoencoder, on the CPU.

    Raises:
        ValueError: the file does not hold all of it.
    """
    import diffusers
    from accelerate import init_empty_weights

    config = read_config(model, "vae")
    family = of_config(read_config(model, "transformer"))
    weights = autoencoder_weights(file, family, config)
    with init_empty_weights():
        made: Any = getattr(diffusers, family.AUTOENCODER).from_config(config)
    own = made.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    check_whole(str(file), "vae", {"missing_keys": missing})
    for name, value in own.items():
        if name in weights and weights[name].shape != value.shape:
            raise ValueError(
                f"model.vae {file} stores {name} in the size {tuple(weights[name].shape)}, where the config asks for "
                f"{tuple(value.shape)}; give the file that belongs to the model"
            )
    given = {name: weights.get(name, torch.zeros((), dtype=value.dtype)) for name, value in own.items()}
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    made.load_state_dict(given, assign=True)
    made.register_to_config(_name_or_path=model.path)
    return made
