"""CUDA graphs: the kernels of one call are captured once for each shape and launched together from then on.

A captured call reads its inputs from fixed places and leaves its outputs in others, which the next call overwrites.
"""

import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from infer.device import allocator
from infer.fast.offload import Offload

Inputs = dict[int | str, Tensor | None]  # by place, or by name


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


class Replay:
    """A function of tensors without random numbers, captured for each form of its inputs, named ones too.

    The first call of a form is an ordinary one, which compiles and tunes; the second captures.
    """

    def __init__(self, function: Callable[..., Any], offload: Offload | None = None) -> None:
        self.function, self.offload = function, offload
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Inputs, Any, int]] = {}
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

    def __call__(self, *unnamed: Tensor | None, **named: Tensor | None) -> Any:
        inputs: Inputs = dict(enumerate(unnamed))
        inputs.update(named)
        form = tuple((key, None if x is None else (x.shape, x.dtype)) for key, x in inputs.items())
        if form not in self.captured:
            if form not in self.seen:
                if self.offload is not None:
                    self.release()  # both do not fit a budget
                self.seen.add(form)
                return self._ordinary(inputs)
            self._capture(form, inputs)
        graph, buffers, output, work = self.captured[form]
        for key, x in inputs.items():
            buffer = buffers[key]
            if buffer is not None and x is not None:
                buffer.copy_(x)
        if self.offload is not None:
            self.offload.rewind()
        graph.replay()
        allocator.count_replay(_device(), work)
        return output

    def _call(self, inputs: Inputs) -> Any:
        unnamed = [x for key, x in inputs.items() if isinstance(key, int)]
        return self.function(*unnamed, **{key: x for key, x in inputs.items() if isinstance(key, str)})

    def _ordinary(self, inputs: Inputs) -> Any:
        """A call that is not captured; if memory runs out, again with what graphs keep for themselves."""
        try:
            return self._call(inputs)
        except torch.OutOfMemoryError:
            if not self.captured:
                raise
        self.release()
        return self._call(inputs)

    def _capture(self, form: Hashable, inputs: Inputs) -> None:
        buffers = {key: None if x is None else x.clone() for key, x in inputs.items()}
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
            output = self._call(buffers)
            if self.offload is not None:
                self.offload.join()
        self.pool = graph.pool()
        self.captured[form] = graph, buffers, output, work[0]


def adapters_state(transformer: Any) -> Hashable:
    """What of the adapters a captured call holds fixed: which are on, and how strong."""
    return tuple(
        (name, module.disable_adapters, tuple(module.active_adapters), tuple(module.scaling.items()))
        for name, module in transformer.named_modules()
        if hasattr(module, "scaling")
    )


class Sampler:
    """The transformer's own forward for sampling, captured; another adapter, or none, is captured anew."""

    def __init__(self, transformer: Any, offload: Offload | None) -> None:
        self.transformer = transformer
        self.plain = type(transformer).forward
        self.replay = Replay(self._velocity, offload)
        self.state: Hashable = None
        transformer.forward = self

    def _velocity(self, **inputs: Tensor | None) -> Tensor:
        if "modulations" in inputs:
            velocity: Tensor = self.transformer.precomputed.velocity(self.transformer, **inputs)
        else:
            velocity = self.plain(self.transformer, **inputs, return_dict=False)[0]
        return velocity

    def refresh(self) -> None:
        """Call before each picture: forget what was captured with other adapters."""
        state = adapters_state(self.transformer)
        if state != self.state:
            self.replay.clear()
            self.state = state

    def __call__(
        self,
        *,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
        **inputs: Tensor | None,
    ) -> tuple[Tensor]:
        """inputs: of the transformer's own forward, whatever its family, or of one with precomputed modulations; the
        pipelines give them by name."""
        assert not return_dict and not joint_attention_kwargs, "the pipeline asks for tuples and scales nothing"
        if torch.is_grad_enabled():
            raise RuntimeError("a captured transformer draws pictures; gradients need the plain one")
        return (self.replay(**inputs).clone(),)
