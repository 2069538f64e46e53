"""Silence the libraries' notices that every run would print and nobody can act on, each by its text, and no others."""

import logging
import warnings
from functools import cache

NOISE = (
    "requires torchvision",  # transformers: image processors that nobody uses here
    "gemm_4bit_forward",  # bitsandbytes: an optional kernel package
    "MatMul8bitLt: inputs will be cast",  # bitsandbytes: LLM.int8 is defined in fp16
    "is not aligned for fast kernel",  # bitsandbytes: a layer of 32 inputs in the bundled klein's text encoder
    "No LoRA keys associated to",  # diffusers: the text encoders have no adapter
    "truncated because",  # diffusers: CLIP always sees 77 tokens at most; captions that are cut are named by us
    "returned a view tensor",  # FSDP 2: FLUX's blocks return views, and nothing changes them in place
    "context_fn is passed to torch.utils.checkpoint",  # torch: sums in place, which scripts/check_fast.py compares
    "Cannot dispatch to fused implementation",  # torch: norms in bf16 read fp32 under autocast, as PEFT has it
    "LOAD REPORT",  # transformers: layers that nothing reads are not loaded; what lacks is refused (check_whole)
    "`torch_dtype` is deprecated",  # diffusers 0.42 renames an argument that older ones need
)


@cache
def ready() -> None:
    """Import torch and the libraries around it, and configure them. Call it once the user's settings are checked."""
    from infer.device.allocator import prepare

    prepare()
    quieten()


def quieten() -> None:
    """Call before diffusers is imported: some notices come at import. Progress bars of loading go too."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.get_logger()
    for text in NOISE:
        warnings.filterwarnings("ignore", message=f".*{text}.*")

    def wanted(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in NOISE)

    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(wanted)
    # these have no handler of their own: the filter sits at the loggers that speak
    for name in (
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.autograd._functions",
        "torch._higher_order_ops.wrap",
    ):
        logging.getLogger(name).addFilter(wanted)
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    diffusers_logging.get_logger()
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(wanted)
