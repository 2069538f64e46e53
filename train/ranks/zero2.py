"""DeepSpeed ZeRO-2 over the adapter: each rank keeps its part of the optimizer's state.

DeepSpeed is given a copy of the adapter and never sees the model: it would cast and move quantized weights, and send
gradients in each backward pass. What it is told is the gradient that the ranks have already averaged and clipped, as
that of a linear function, so that steps, checkpoints and everything before them are those of the other launches.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class ZeroTwo:
    """An optimizer in the place of the one that it shares out, as it is; all ranks call each method together."""

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
        self.parameters, self.own = list(parameters), optimizer
        self.copies = [nn.Parameter(parameter.detach().clone()) for parameter in self.parameters]
        (group,) = optimizer.param_groups
        states = [optimizer.state.pop(parameter, {}) for parameter in group["params"]]
        group["params"] = self.copies
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop adds up by itself
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=nn.ParameterList(self.copies), optimizer=optimizer, config=config, dist_init_required=False
        )
        self._share(states)

    def step(self) -> None:
        """One update with the gradients that the parameters have."""
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

    def _part(self) -> Tensor:
        """This rank's part of all parameters behind each other, filled up to equal parts."""
        (part,) = self.own.param_groups[0]["params"]
        assert isinstance(part, Tensor) and len(self.own.param_groups) == 1
        return part

    def state_dict(self) -> dict[str, Any]:
        """As the shared out optimizer's own, whole, on every rank."""
        part, states = self._part(), {}
        for name, value in self.own.state[part].items():
            if value.dim() == 0:
                states[name] = [value] * len(self.parameters)
                continue
            parts = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, value.contiguous())
            whole = torch.cat(parts)[: sum(p.numel() for p in self.parameters)]
            pieces = whole.split([p.numel() for p in self.parameters])
            states[name] = [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]
        group = {key: value for key, value in self.own.param_groups[0].items() if key != "params"}
        count = len(self.parameters)
        each = {i: {name: values[i] for name, values in states.items()} for i in range(count)} if states else {}
        return {"state": each, "param_groups": [group | {"params": list(range(count))}]}

    def _share(self, states: list[dict[str, Tensor]]) -> None:
        """Take this rank's part of each parameter's state."""
        part, rank = self._part(), torch.distributed.get_rank()
        for name, first in states[0].items():
            if first.dim() == 0:
                self.own.state[part][name] = first.clone()
                continue
            flat = torch.cat([state[name].flatten() for state in states])
            padded = flat.new_zeros(part.numel() * torch.distributed.get_world_size())
            padded[: flat.numel()] = flat
            self.own.state[part][name] = padded[rank * part.numel() : (rank + 1) * part.numel()].clone()
