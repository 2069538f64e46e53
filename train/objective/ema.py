"""The moving average of an adapter's weights beside the weights themselves (diffusers' EMAModel).

After s updates the average moves by the fraction 1 - min(decay, s / (9 + s)) towards the weights: the first updates
count less, and the weights from before the first one not at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from infer.adapter.attached import adapter_state, set_adapter_state


class Average:
    """An adapter's averaged weights, in fp32 as the weights are."""

    def __init__(self, decay: float, transformer: Any, parameters: list[nn.Parameter]) -> None:
        self.transformer, self.parameters = transformer, parameters
        self.model = EMAModel(parameters, decay=decay, foreach=True)

    def update(self) -> None:
        """Call after each update of the weights."""
        self.model.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the adapter for the with-block."""
        self.model.store(self.parameters)
        self.model.copy_to(self.parameters)
        try:
            yield
        finally:
            self.model.restore(self.parameters)

    def state(self) -> tuple[dict[str, Tensor], int]:
        """The averaged weights under PEFT's names, and the number of updates."""
        with self.applied():
            return adapter_state(self.transformer), self.model.optimization_step

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Restore what `state` returned. The adapter then has the averaged weights: load its own afterwards."""
        set_adapter_state(self.transformer, weights)
        self.model.shadow_params = [parameter.detach().clone() for parameter in self.parameters]
        self.model.optimization_step = updates


def make_average(decay: float | None, transformer: Any, parameters: list[nn.Parameter]) -> Average | None:
    return None if decay is None else Average(decay, transformer, parameters)
