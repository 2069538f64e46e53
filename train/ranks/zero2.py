"""DeepSpeed ZeRO-2 over the adapter: each rank keeps its partition of the optimizer's state.

DeepSpeed gets a copy of the adapter and never sees the model: it would cast and move quantized weights, and send
gradients in each backward pass. It gets the gradient that the ranks have already averaged and clipped, as the gradient
of a linear function; so everything up to the step, and the checkpoints, are the same as with other launches.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class ZeroTwo:
    """Takes the place of an optimizer whose state it partitions. All ranks call each method together."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """
        Raises:
            ValueError: DeepSpeed is not installed.
        """
        try:
            import deepspeed
        except ImportError as error:
            raise ValueError(
                f"DeepSpeed cannot be loaded ({error}): pip install deepspeed, or use configs/accelerate/ddp.yaml"
            ) from error
        self.parameters, self.optimizer = list(parameters), optimizer
        self.copies = [nn.Parameter(parameter.detach().clone()) for parameter in self.parameters]
        (group,) = optimizer.param_groups
        states = [optimizer.state.pop(parameter, {}) for parameter in group["params"]]
        group["params"] = self.copies
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop accumulates by itself
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=nn.ParameterList(self.copies), optimizer=optimizer, config=config, dist_init_required=False
        )
        self._scatter(states)

    def step(self) -> None:
        """One update with the parameters' gradients."""
        terms = []
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            assert parameter.grad is not None
            terms.append((copy * parameter.grad).sum())
        self.engine.backward(torch.stack(terms).sum())
        self.engine.step()
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            parameter.data.copy_(copy.data)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _partition(self) -> Tensor:
        """This rank's partition of all parameters, which are concatenated and padded to equal partitions."""
        (part,) = self.optimizer.param_groups[0]["params"]
        assert isinstance(part, Tensor) and len(self.optimizer.param_groups) == 1
        return part

    def state_dict(self) -> dict[str, Any]:
        """The whole optimizer's state dict, gathered on every rank."""
        part, states = self._partition(), {}
        for name, value in self.optimizer.state[part].items():
            if value.dim() == 0:
                states[name] = [value] * len(self.parameters)
                continue
            parts = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, value.contiguous())
            whole = torch.cat(parts)[: sum(p.numel() for p in self.parameters)]
            pieces = whole.split([p.numel() for p in self.parameters])
            states[name] = [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]
        group = {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}
        count = len(self.parameters)
        each = {i: {name: values[i] for name, values in states.items()} for i in range(count)} if states else {}
        return {"state": each, "param_groups": [group | {"params": list(range(count))}]}

    def _scatter(self, states: list[dict[str, Tensor]]) -> None:
        """Keep this rank's partition of each parameter's state."""
        part, rank = self._partition(), torch.distributed.get_rank()
        for name, first in states[0].items():
            if first.dim() == 0:
                self.optimizer.state[part][name] = first.clone()
                continue
            flat = torch.cat([state[name].flatten() for state in states])
            padded = flat.new_zeros(part.numel() * torch.distributed.get_world_size())
            padded[: flat.numel()] = flat
            self.optimizer.state[part][name] = padded[rank * part.numel() : (rank + 1) * part.numel()].clone()
