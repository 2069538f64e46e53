"""The quantizer that diffusers is given: bitsandbytes' layers, of one kind or of several in one transformer, quantized
on one device, a CPU too, and held on another.

diffusers has a quantizer for 4-bit and one for int8 models, each of which refuses a CPU before bitsandbytes is asked.
The class made here asks the one or the other for each layer, so that every weight is quantized as it is read.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from diffusers import BitsAndBytesConfig
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from torch import nn

from infer.quantize.precision import Precision, kind_asked, linear_layers, names_layer


class Method(StrEnum):
    """By which diffusers finds the quantizer of a configuration."""

    MIXED = "bitsandbytes_mixed"


METHODS = ("bitsandbytes_4bit", "bitsandbytes_8bit", Method.MIXED)


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


def quantization_config(precision: Precision, library: Any, layers: Iterable[str] = ()) -> Any | None:
    """The BitsAndBytesConfig of `library` (diffusers or transformers), every field explicit; None if not quantized.

    layers: the model's linear layers. Of them those that are skipped are given by their whole names: of a part of a
    name, diffusers takes `transformer_blocks.0` for the end of `single_transformer_blocks.0` too.
    """
    if precision.kind == "auto":  # the commands that know it have decided it before anything is loaded
        raise ValueError(
            "precision=auto works in train, compare, gap and transfer; elsewhere give the precision that "
            "infer/sensitivity.py writes (out=configs/precision/mine.yaml)"
        )
    if not precision.quantized:
        return None
    if precision.layers:
        return MixedConfig(precision)
    skipped = [layer for layer in layers if any(names_layer(name, layer) for name in precision.skip_modules)]
    if precision.kind == "int8":
        return library.BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=precision.outlier_threshold,
            llm_int8_skip_modules=skipped,
            llm_int8_has_fp16_weight=False,
        )
    return library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision.kind,
        bnb_4bit_compute_dtype=precision.dtype,
        bnb_4bit_use_double_quant=precision.double_quant,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=skipped,
    )


class LayerQuantizer(DiffusersQuantizer):
    """diffusers' 4-bit and int8 quantizers, each asked about its own layers."""

    use_keep_in_fp32_modules = True

    def __init__(self, config: BitsAndBytesConfig, device: torch.device, hold: torch.device, **kwargs: Any) -> None:
        """Quantize on `device`, and hold each parameter on `hold`."""
        super().__init__(config, **kwargs)
        self.device, self.hold = device, hold
        self.four = BnB4BitDiffusersQuantizer(config, **kwargs)
        self.eight = BnB8BitDiffusersQuantizer(config, **kwargs)
        self.mixed: Precision | None = getattr(config, "precision", None)
        self.main: Any = self.eight if config.load_in_8bit else self.four  # what diffusers itself would take

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.hold.type != "cpu":
            self.main.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any]:
        return device_map or {"": self.hold}

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        dtype: torch.dtype = self.main.update_torch_dtype(torch_dtype)
        return dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        return self.main.adjust_target_dtype(torch_dtype)

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        memory: dict[str, Any] = self.main.adjust_max_memory(max_memory)
        return memory

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        return list(self.main.maybe_update_loaded_keys(loaded_keys, checkpoint_files))

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.main.maybe_update_state_dict(state_dict)
        return state

    @property
    def supports_parallel_loading(self) -> bool:
        return bool(self.main.supports_parallel_loading)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self.mixed is None:
            self.main._process_model_before_weight_loading(model, device_map, **kwargs)
            self.modules_to_not_convert = self.main.modules_to_not_convert
            return
        for name, layer in linear_layers(model).items():
            kind = kind_asked(self.mixed, name)
            if kind is not None:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, _empty_layer(layer, kind, self.mixed))
        model.config.quantization_config = self.quantization_config
        # PEFT asks the model before it looks at the layer
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return self.main._process_model_after_weight_loading(model, **kwargs)

    def _quantizer_of(self, model: nn.Module, name: str) -> Any:
        """diffusers' quantizer of the layer that a parameter is of."""
        import bitsandbytes as bnb

        layer = model.get_submodule(name.rpartition(".")[0])
        return self.eight if isinstance(layer, bnb.nn.Linear8bitLt) else self.four

    def check_if_quantized_param(self, model: Any, value: Any, name: str, *args: Any, **kwargs: Any) -> bool:
        return bool(self._quantizer_of(model, name).check_if_quantized_param(model, value, name, *args, **kwargs))

    def create_quantized_param(self, model: Any, value: Any, name: str, target: Any, *args: Any, **kwargs: Any) -> None:
        moves = self.hold != self.device
        create = self._quantizer_of(model, name).create_quantized_param
        create(model, value, name, self.device if moves else target, *args, **kwargs)
        if moves:
            module, _, tensor = name.rpartition(".")
            layer = model.get_submodule(module)
            layer._parameters[tensor] = held(getattr(layer, tensor), self.hold)

    def check_quantized_param_shape(self, name: str, current: Any, loaded: Any) -> bool:
        return bool(self.main.check_quantized_param_shape(name, current, loaded))

    def _dequantize(self, model: Any) -> Any:
        return self.main._dequantize(model)

    @property
    def is_serializable(self) -> bool:
        return self.mixed is None  # plain diffusers could not read a mixture

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return bool(self.main.is_compileable)


@contextmanager
def quantizing_on(device: torch.device, hold: torch.device) -> Iterator[None]:
    """Within, diffusers quantizes on `device`, layer by layer, and holds each on `hold`; a stored quantized checkpoint
    is read by the same class.

    Raises:
        ValueError: the device is neither CUDA nor CPU.
    """
    if device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"int8, fp4 and nf4 need a CUDA device or a CPU, not {device}: set precision=bf16 or device=cpu"
        )
    before = dict(AUTO_QUANTIZER_MAPPING)
    AUTO_QUANTIZER_MAPPING.update(dict.fromkeys(METHODS, partial(LayerQuantizer, device=device, hold=hold)))
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.clear()
        AUTO_QUANTIZER_MAPPING.update(before)


def held(parameter: nn.Parameter, hold: torch.device) -> nn.Parameter:
    """A parameter on another device, of its own class, with its quantization constants.

    bitsandbytes' classes move them along; a plain parameter's `to` gives a tensor, which no module takes for its own.
    """
    moved = parameter.to(hold)
    return moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, parameter.requires_grad)


def _empty_layer(layer: nn.Linear, kind: str, precision: Precision) -> nn.Module:
    """bitsandbytes' layer of a kind in the place of a plain one, its weights still to come."""
    import bitsandbytes as bnb

    shape = layer.in_features, layer.out_features, layer.bias is not None
    with torch.device("meta"):
        if kind == "int8":
            empty = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=precision.outlier_threshold)
        else:
            empty = bnb.nn.Linear4bit(
                *shape,
                precision.dtype,
                compress_statistics=precision.double_quant,
                quant_type=kind,
                quant_storage=torch.uint8,
            )
    empty.source_cls = type(layer)
    empty.requires_grad_(False)
    return empty  # type: ignore[no-any-return]
