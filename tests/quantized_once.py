"""Weights quantized to 4 bits once a process, for tests: on a CPU that is three quarters of loading the bundled model,
which hundreds of them do."""

import copy
from typing import Any

REMEMBERED = 2000  # weights, some 80 MB; those of the bundled model are met first


def remember_quantized() -> None:
    """From here on, a weight that was quantized already is not quantized again: what was made of it is copied."""
    import torch
    from bitsandbytes import functional
    from xxhash import xxh3_128_digest  # which datasets asks for

    found: dict[Any, Any] = {}
    quantize = functional.quantize_4bit

    def remembered(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if args or type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.device.type != "cpu":
            return quantize(weight, *args, **kwargs)
        content = weight.detach().contiguous().view(torch.uint8).numpy()
        key = xxh3_128_digest(content), weight.shape, weight.dtype, *sorted(kwargs.items())
        made = found.get(key)
        if made is None:
            made = quantize(weight, **kwargs)
            if len(found) >= REMEMBERED:
                return made
            found[key] = made
        return copy.deepcopy(made)

    functional.quantize_4bit = remembered
