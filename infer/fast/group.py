"""Layers of a block that read one input, found by name, and their stacked weights."""

from typing import Any

from torch import nn

from infer.fast.weights import Linear, Stack, adapters_of, stack, trained, use_views


class Group:
    """Layers that read one input, by name, and their stacked weights.

    By name, because an adapter that is attached or taken off puts another module in a layer's place.
    """

    def __init__(self, block: nn.Module, *names: str) -> None:
        self.block, self.names = block, names
        self.holds = False  # adapters in training that are off, at strength 0
        self.use(stack(self._layers()))

    def _modules(self) -> list[nn.Module]:
        return [self.block.get_submodule(name) for name in self.names]

    def _layers(self) -> list[Any]:
        return [getattr(module, "base_layer", module) for module in self._modules()]

    def use(self, frozen: Stack) -> None:
        """Take these weights, and have the layers use_views them."""
        self.frozen = frozen
        use_views(self._layers(), frozen)

    def modulates(self) -> bool:
        """Whether they are a modulation: products of one vector, and not of tokens."""
        return self.names[0].startswith("norm")

    def learns(self) -> bool:
        """Whether an adapter of theirs is in training."""
        return any(map(trained, self._modules()))

    def linear(self) -> Linear:
        return Linear(self.frozen, tuple(adapters_of(module, self.holds) for module in self._modules()))
