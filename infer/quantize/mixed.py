"""Layers of several kinds in one transformer: diffusers' two bitsandbytes quantizers, each for its own layers.

diffusers reads one configuration a model; the one made here says each layer's kind, so that every weight is quantized
as it is read, like those of a model of one kind.
"""

from dataclasses import asdict
from enum import StrEnum
from typing import Any

import torch
from diffusers import BitsAndBytesConfig
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from torch import nn

from infer.quantize.precision import Precision, kind_asked, linear_layers


class Method(StrEnum):
    """By which diffusers finds the quantizer of a configuration."""

    MIXED = "bitsandbytes_mixed"


class MixedConfig(BitsAndBytesConfig):
    """The 4-bit settings of a precision, and the precision itself for what each layer is."""

    def __init__(self, precision: Precision) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=precision.dtype,
            bnb_4bit_use_double_quant=precision.double_quant,
            bnb_4bit_quant_storage=torch.uint8,
            llm_int8_skip_modules=[],
        )
        self.precision = precision
        self.quant_method = Method.MIXED

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "precision": asdict(self.precision)}


class MixedQuantizer(BnB4BitDiffusersQuantizer):
    """4-bit layers by the class itself, int8 ones by the other quantizer."""

    def __init__(self, config: MixedConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.eight = BnB8BitDiffusersQuantizer(config, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        precision = self.quantization_config.precision
        for name, layer in linear_layers(model).items():
            kind = kind_asked(precision, name)
            if kind is not None:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, _empty_layer(layer, kind, precision))
        model.config.quantization_config = self.quantization_config
        # PEFT asks the model before it looks at the layer
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True

    def _int8(self, model: nn.Module, name: str) -> bool:
        import bitsandbytes as bnb

        return isinstance(model.get_submodule(name.rpartition(".")[0]), bnb.nn.Linear8bitLt)

    def check_if_quantized_param(self, model: Any, value: Any, name: str, *args: Any, **kwargs: Any) -> bool:
        ask = self.eight.check_if_quantized_param if self._int8(model, name) else super().check_if_quantized_param
        return bool(ask(model, value, name, *args, **kwargs))

    def create_quantized_param(self, model: Any, value: Any, name: str, *args: Any, **kwargs: Any) -> None:
        create = self.eight.create_quantized_param if self._int8(model, name) else super().create_quantized_param
        create(model, value, name, *args, **kwargs)

    def check_quantized_param_shape(self, name: str, current: Any, loaded: Any) -> bool:
        import bitsandbytes as bnb

        # int8 weights keep their shape, and diffusers compares those itself
        return not isinstance(current, bnb.nn.Params4bit) or bool(
            super().check_quantized_param_shape(name, current, loaded)
        )

    @property
    def is_serializable(self) -> bool:
        return False  # plain diffusers could not read it


def _empty_layer(layer: nn.Linear, kind: str, precision: Precision) -> nn.Module:
    """bitsandbytes' layer of a kind in the place of a plain one, its weights still to come."""
    import bitsandbytes as bnb

    shape = layer.in_features, layer.out_features, layer.bias is not None
    with torch.device("meta"):
        if kind == "int8":
            own = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=precision.outlier_threshold)
        else:
            own = bnb.nn.Linear4bit(
                *shape,
                precision.dtype,
                compress_statistics=precision.double_quant,
                quant_type=kind,
                quant_storage=torch.uint8,
            )
    own.source_cls = type(layer)
    own.requires_grad_(False)
    return own  # type: ignore[no-any-return]


AUTO_QUANTIZER_MAPPING[Method.MIXED] = MixedQuantizer
