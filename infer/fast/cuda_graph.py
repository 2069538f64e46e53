"""CUDA graphs: the kernels of one call are captured once for each shape and launched together from then on.

A captured call reads its inputs from fixed places and leaves its outputs in others, which the next call overwrites.
"""

import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from infer.device import allocator
from infer.fast.offload import Offload


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


class Replay:
    """A function of tensors without random numbers, captured for each form of its inputs.

    The first call of a form is an ordinary one, which compiles and tunes; the second captures.
    """

    def __init__(self, function: Callable[..., Any], offload: Offload | None = None) -> None:
        self.function, self.offload = function, offload
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Any, int]] = {}
        self.seen: set[Hashable] = set()
        self.pool: Any = None
        if offload is not None:
            offload.graphs.append(self.release)

    def release(self) -> None:
        """Give back the memory of what was captured; the next call of each form captures it again."""
        if self.captured:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()  # those of the captured calls lie in their memory
        self.captured.clear()
        self.pool = None
        torch.cuda.empty_cache()  # before that, what a graph had is of no use to ordinary calls

    def clear(self) -> None:
        """Forget what was seen: something that it holds fixed has changed, and ordinary calls compile anew."""
        self.release()
        self.seen.clear()

    def __call__(self, *inputs: Tensor | None) -> Any:
        form = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        if form not in self.captured:
            if form not in self.seen:
                if self.offload is not None:
                    self.release()  # both do not fit a budget
                self.seen.add(form)
                return self._ordinary(inputs)
            self._capture(form, inputs)
        graph, buffers, output, work = self.captured[form]
        for buffer, x in zip(buffers, inputs, strict=True):
            if buffer is not None and x is not None:
                buffer.copy_(x)
        if self.offload is not None:
            self.offload.rewind()
        graph.replay()
        allocator.count_replay(_device(), work)
        return output

    def _ordinary(self, inputs: tuple[Tensor | None, ...]) -> Any:
        """A call that is not captured; if memory runs out, again with what graphs keep for themselves."""
        try:
            return self.function(*inputs)
        except torch.OutOfMemoryError:
            if not self.captured:
                raise
        self.release()
        return self.function(*inputs)

    def _capture(self, form: Hashable, inputs: tuple[Tensor | None, ...]) -> None:
        buffers = [None if x is None else x.clone() for x in inputs]
        if self.offload is not None:
            self.offload.rewind()
        torch.cuda.synchronize()
        gc.collect()  # another model's memory is not given back in the middle of a capture
        # what ordinary calls held is the graph's now; it takes workspaces of its own
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # one pool for all: no two of them run at once, and what they leave is read before the next one runs
        # of this thread alone: with several processes NCCL's own looks after its events at any time
        capture = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
        with allocator.watched(_device()) as work, capture:
            output = self.function(*buffers)
            if self.offload is not None:
                self.offload.join()
        self.pool = graph.pool()
        self.captured[form] = graph, buffers, output, work[0]


def adapters_state(transformer: FluxTransformer2DModel) -> Hashable:
    """What of the adapters a captured call holds fixed: which are on, and how strong."""
    return tuple(
        (name, module.disable_adapters, tuple(module.active_adapters), tuple(module.scaling.items()))
        for name, module in transformer.named_modules()
        if hasattr(module, "scaling")
    )


class Sampler:
    """The transformer's own forward for sampling, captured; another adapter, or none, is captured anew."""

    def __init__(self, transformer: FluxTransformer2DModel, offload: Offload | None) -> None:
        self.transformer = transformer
        self.plain = type(transformer).forward
        self.replay = Replay(self._velocity, offload)
        self.state: Hashable = None
        transformer.forward = self

    def _velocity(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None,
    ) -> Tensor:
        velocity: Tensor = self.plain(
            self.transformer,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            return_dict=False,
        )[0]
        return velocity

    def refresh(self) -> None:
        """Call before each picture: forget what was captured with other adapters."""
        state = adapters_state(self.transformer)
        if state != self.state:
            self.replay.clear()
            self.state = state

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        assert not return_dict and not joint_attention_kwargs, "the pipeline asks for tuples and scales nothing"
        if torch.is_grad_enabled():
            raise RuntimeError("a captured transformer draws pictures; gradients need the plain one")
        inputs = hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance
        return (self.replay(*inputs).clone(),)
