"""Device memory of training, by part, from shapes alone: no weights, no GPU.

Stored tensors are counted. The working memory of a block's backward pass was measured and grows with the tokens. Sizes
are in bytes. The unit of working memory is one activation of the transformer's width: batch x tokens x width x 2 bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.adapter.sizes import match_adapter, tensor_sizes
from infer.checkpoint.files import known_config
from infer.checkpoint.layers import linear_shapes, norm_sizes
from infer.checkpoint.model import Model
from infer.checkpoint.sources import rest_of
from infer.family.family import Linear
from infer.family.find import of_config
from infer.fast.memory import device_bytes, residents
from infer.quantize.precision import Precision, kind_asked
from infer.quantize.storage import weight_bytes
from train.data.dataset import sources_of
from train.data.metadata import most_references
from train.estimate.flop import tokens_of
from train.objective.optim import state_bytes
from train.run.config import Train

# measured (tests/plan_grid.jsonl): activations that are rounded to 8 bits for a product beside its weights;
# memory=lean's products are more and smaller
ROUNDED, ROUNDED_LEAN = 3.0, 5.5
WORKSPACE = 96 * 2**20  # of the libraries' kernels
CONTEXT = int(0.85 * 2**30)  # CUDA's own memory, outside torch's allocator: H100, torch 2.11
# GiB that torch's allocator holds beyond the peak of the allocated bytes, measured likewise; where the products of
# 4-bit layers are kept, a family's own
HOLES, HOLES_PLAIN, HOLES_OFFLOADED = 0.3, 0.15, 0.17


@dataclass
class Footprint:
    """Bytes by part, at the peak of a training step."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    checkpoints: int
    """Tensors of each block that are kept from its forward to its backward pass."""
    block: int
    """Working memory of one block's backward pass."""
    workspace: int
    """Of cuBLAS and cuDNN."""
    allocator: int
    """Held by torch's allocator beyond the allocated bytes: holes between freed tensors."""
    context: int
    """CUDA's own."""
    host: int
    """Pinned host memory of the blocks, where some are offloaded."""
    resident: int
    """How many blocks keep their weights on the device."""
    blocks: int
    """How many blocks the transformer has."""
    text_phase: int
    """The text encoders' weights, before the transformer is loaded."""

    @property
    def allocated(self) -> int:
        """Bytes that torch allocates at the peak of a step."""
        learned = self.adapters + self.gradients + self.optimizer
        return self.weights + learned + self.checkpoints + self.block + self.workspace

    @property
    def peak(self) -> int:
        """Bytes that the device must have: the larger of the two phases, the allocator's holes, and CUDA's own."""
        return max(self.allocated, self.text_phase) + self.allocator + self.context


def layer_bytes(rows: int, columns: int, kind: str | None, precision: Precision) -> int:
    """Bytes of a linear layer's weight [rows, columns] as it is stored, without its bias."""
    return weight_bytes(rows, columns, kind, precision.double_quant, precision.itemsize)


def weights_by_module(config: dict[str, Any], precision: Precision) -> dict[str, int]:
    """Stored bytes of every module's parameters, without those of its children. config: the transformer's."""
    found = {name: count * precision.itemsize for name, count in norm_sizes(config).items()}
    bias = of_config(config).BIAS * precision.itemsize
    for name, layer in linear_shapes(config).items():
        found[name] = layer_bytes(*layer, kind_asked(precision, name), precision) + layer.rows * bias
    return found


def text_bytes(model: Model, precision: Precision) -> int:
    """Bytes of the text encoders' weights, as far as they are loaded."""
    family, large = of_config(known_config(model, "transformer")), precision.for_t5()
    total = 0
    for encoder in family.ENCODERS:
        size = family.text_size(encoder.part, known_config(model, encoder.part))
        itemsize = large.itemsize if encoder.large else 2
        wide = 4 if large.quantized and large.compute_dtype == "fp16" else itemsize
        total += sum(layer_bytes(*layer, large.kind, large) for layer in size.layers)
        total += size.kept * itemsize + size.wide * wide
    return total


def text_tokens(job: Train) -> int:
    """Text tokens of a caption in training: data.text_length, else what the checkpoint was trained with."""
    if job.data.text_length is not None:
        return job.data.text_length
    return of_config(known_config(job.model, "transformer")).TOKENS.get(rest_of(job.model).path, 512)


def references_of(job: Train) -> int:
    """The most references of a sample: those that the settings name, or a metadata.jsonl of a folder that is here."""
    sources = sources_of(job.data)
    named = (most_references(Path(source.path).expanduser()) for source in sources if source.path)
    return max((*(len(source.references) for source in sources), *named), default=0)


def largest_pixels(job: Train) -> int:
    """Pixels of the largest picture of a training and of its references."""
    side = max(job.data.resolutions)
    return side**2 + references_of(job) * (job.data.reference_resolution or side) ** 2


def footprint(job: Train) -> Footprint:
    """Memory of a training config at its largest resolution.

    Raises:
        ValueError: the adapter's targets match no layer, or the budget is too small even with every block offloaded.
    """
    config = known_config(job.model, "transformer")
    units = of_config(config).ACTIVATIONS
    sizes = weights_by_module(config, job.precision)
    layers = linear_shapes(config)
    names = match_adapter(layers, job.adapter)
    targets = [layers[name] for name in names]
    tensors = [count for layer in targets for count in tensor_sizes(job.adapter, layer)]

    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = config["num_layers"] + config["num_single_layers"]
    tokens = tokens_of(largest_pixels(job), text_tokens(job)) * job.data.batch_size
    activation = tokens * width * (2 if job.precision.dtype_name == "bf16" else 4)  # fp16 is carried in fp32
    attended = tokens * width * job.precision.itemsize
    logs = 4 * tokens * config["num_attention_heads"]  # attention's log-sum-exp
    keep = job.memory.keep
    whole = blocks if keep == "everything" else min(job.memory.keep_all, blocks)  # blocks that keep everything
    part = blocks - whole
    kept = blocks * activation + int(whole * (activation * units.everything + logs))
    if keep == "attention":
        kept += part * (attended + logs)
    elif keep == "products":
        adapted = sum(layer.rows / width for layer in targets) / blocks
        kept += int(part * (activation * (1 + units.products + 0.75 * adapted) + logs))
    work = int(units.work * activation)
    single = {name: each for name, each in layers.items() if name.startswith("single_transformer_blocks.0.")}
    size = {name.split(".", 2)[2]: each for name, each in single.items() if "norm" not in name}
    reads = {name: each.rows * each.columns for name, each in size.items() if each.columns == width}
    writes = max(each.rows * each.columns for name, each in size.items() if name not in reads)
    # weights of one matrix product; memory=lean computes what attention reads in one, and the MLP in another
    attention = 3 * width**2  # FLUX.2 has one layer for both, of which it takes the rows
    apart = max(attention, sum(reads.values()) - attention)
    largest = max(writes, apart if keep == "nothing" else sum(reads.values()))
    if not job.memory.fused:
        four = job.precision.kind in ("nf4", "fp4")
        work = int((units.plain_4bit if four else units.plain) * activation)
    if job.precision.products != "bf16":
        work += largest + int((ROUNDED_LEAN if keep == "nothing" else ROUNDED) * activation)
    elif job.precision.quantized and not job.memory.unpacked:
        work += 2 * largest  # dequantized to bf16
        if job.memory.fused and keep in ("attention", "products"):
            work += largest  # the dequantized copy is kept from the recomputation to the gradient

    first = [
        [layers[name] for name in names if name.startswith(f"{stack}transformer_blocks.0.")]
        for stack in ("single_", "")
    ]
    work += _kind_work(job, first[0] or first[1], tokens)

    by_block = [
        sum(size for name, size in sizes.items() if name.startswith(f"{stack}.{i}."))
        for stack, count in (
            ("transformer_blocks", config["num_layers"]),
            ("single_transformer_blocks", config["num_single_layers"]),
        )
        for i in range(count)
    ]
    copies = sum(each.rows * each.columns for name, each in layers.items() if "blocks." in name and ".norm" not in name)
    result = Footprint(
        weights=sum(sizes.values()) + 2 * copies * job.memory.unpacked,
        adapters=4 * sum(tensors) * (1 if job.ema is None else 2),
        gradients=4 * sum(tensors) * (2 if _sums_apart(job) else 1),
        optimizer=state_bytes(job.optim.name, tensors),
        checkpoints=kept,
        block=work,
        workspace=WORKSPACE,
        allocator=int(_holes(job, blocks, units.holes) * 2**30),
        context=CONTEXT,
        host=0,
        resident=blocks,
        blocks=blocks,
        text_phase=text_bytes(job.model, job.precision),
    )
    if job.memory.budget_gib is not None:
        _offload(result, by_block, job)
    return result


def _kind_work(job: Train, adapted: list[Linear], tokens: int) -> int:
    """What an adapter that is no LoRA, on these layers, adds to a block's backward pass.

    As measured (docs/benchmarks/kinds.jsonl), and as its forward pass leaves tensors: of LoKr each layer's output
    twice, of OFT each input twice, of LoHa one whole update in fp32. Of PEFT's DoRA as much as each output eight times
    was measured; the fast path's takes no more than LoRA.
    """
    kind, itemsize = job.adapter.kind, job.precision.itemsize
    if job.adapter.dora and not job.memory.fused:
        return 8 * itemsize * tokens * sum(layer.rows for layer in adapted)
    if kind == "lokr":
        return 2 * itemsize * tokens * sum(layer.rows for layer in adapted)
    if kind == "oft":
        return 2 * itemsize * tokens * sum(layer.columns for layer in adapted)
    return 4 * max((layer.rows * layer.columns for layer in adapted), default=0) if kind == "loha" else 0


def _sums_apart(job: Train) -> bool:
    """Whether the gradients of an update's micro-batches are added up in tensors besides those of a captured step."""
    return job.accumulation > 1 and job.memory.fused and job.memory.graph is not False


def _holes(job: Train, blocks: int, kept: float) -> float:
    if not job.memory.fused:
        return HOLES_PLAIN
    if job.memory.budget_gib is not None:
        return HOLES_OFFLOADED
    if job.precision.kind not in ("nf4", "fp4"):
        return HOLES
    whole = 1.0 if job.memory.keep in ("products", "everything") else min(1.0, job.memory.keep_all / blocks)
    return HOLES + whole * (kept - HOLES)


def _offload(result: Footprint, by_block: list[int], job: Train) -> None:
    """Keep as many blocks on the device as the budget allows. The others lie in host memory and share a few slots.

    Raises:
        ValueError: the budget is too small.
    """
    budget = int((job.memory.budget_gib or 0) * 2**30)
    rest = result.weights - sum(by_block)
    work = rest + result.allocated - result.weights + result.allocator
    least = work + device_bytes(by_block, 0)
    if least > budget:
        raise ValueError(
            f"memory.budget_gib is {job.memory.budget_gib}, but with every block in host memory the work itself takes "
            f"about {least / 2**30:.2f} GiB; raise the budget, or choose memory=lean, a smaller resolution or "
            "batch_size"
        )
    result.resident, result.host = residents(by_block, budget - work), sum(by_block)
    result.weights = rest + device_bytes(by_block, result.resident)
