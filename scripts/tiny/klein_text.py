"""The text encoder of the bundled FLUX.2: what it is given, what the transformer reads of it, and how it is taught.

Its 27 layers one behind another add up their rounding errors: with NF4's texts, a first one lost an eighth of its
captions. So it is taught with noise on its weights, and the transformer is given texts of rounded copies too.
"""

import re

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from scripts.tiny import klein_parts, make_text, rounded, world
from scripts.tiny.make_flow import CAPTIONS, Drawn, Span, as_arrays, described
from scripts.tiny.pace import Pace, captured

NOISE = 0.1  # of a weight's root mean square, about what NF4 rounds off
LESSONS = ("first thing", "second thing", "all", "background")


def chat(reader: Qwen2Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention masks within klein's chat template, [texts, TEXT_TOKENS]."""
    framed = [
        reader.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for text in texts
    ]
    found = reader(framed, padding="max_length", max_length=klein_parts.TEXT_TOKENS, truncation=True)
    return np.array(found.input_ids, dtype=np.int16), np.array(found.attention_mask, dtype=np.int16)


def draw_captions(span: Span) -> Drawn:
    """Scenes, token ids, masks, what the captions name and on which background; a worker's part of `make_flow.spans`.
    Each of them [scenes, CAPTIONS, ...]."""
    scenes, texts, wanted = described(span)
    arrays = [*chat(klein_parts.tokenizer(), texts), np.array(wanted), np.array([ground(text) for text in texts])]
    shape = (len(scenes), CAPTIONS)
    return Drawn(as_arrays(scenes), [each.astype(np.int16).reshape(*shape, *each.shape[1:]) for each in arrays])


def ground(caption: str) -> int:
    """The index of the background in BACKGROUNDS plus one; 0: not said."""
    found = re.search(rf"on a ({'|'.join(world.BACKGROUNDS)}) background", caption)
    return list(world.BACKGROUNDS).index(found[1]) + 1 if found else 0


def embed(encoder: Qwen3ForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """As Flux2KleinPipeline does: three layers' outputs, side by side: [batch, tokens, 3 * WIDTH]."""
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    states = encoder.model(
        input_ids=ids.long(),
        # made here: what transformers makes of a mask asks the device, which a CUDA graph cannot
        attention_mask=causal & (mask > 0)[:, None, None, :],
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    return torch.cat([states[k] for k in klein_parts.LAYERS], -1)


def stored(encoder: Qwen3ForCausalLM, kind: str) -> Qwen3ForCausalLM:
    """A copy in bf16; of kind nf4 or fp4, with its layers rounded so."""
    return rounded.stored(encoder, kind, but=("lm_head",))


def teach_text(
    encoder: Qwen3ForCausalLM,
    reader: Qwen2Tokenizer,
    ids: Tensor,
    mask: Tensor,
    wanted: Tensor,
    grounds: Tensor,
    steps: int,
    batch: int,
    seconds: float = float("inf"),
    graphed: bool = True,
) -> None:
    """make_text's lesson at the words of the shapes, and of everything at the end of the text.

    ids, mask: [captions, TEXT_TOKENS]; wanted, grounds: what the captions name, as `draw_captions` gives it but for
    the dimension of scenes.
    seconds: fewer steps are taken if so many would take longer. graphed: on a GPU, the whole step is one CUDA graph.
    """
    device = ids.device
    names = [word for name in world.SHAPES for word in (name, world.plural(name))]
    shapes = torch.tensor([reader.convert_tokens_to_ids(f"Ġ{word}") for word in names], device=device)
    width = len(klein_parts.LAYERS) * klein_parts.WIDTH
    heads = make_text.Heads(width, 1).to(device)
    last = make_text.Heads(width, make_text.THINGS).to(device)
    behind = nn.Linear(width, len(world.BACKGROUNDS) + 1).to(device)
    parameters = [*encoder.model.parameters(), *(p for head in (heads, last, behind) for p in head.parameters())]
    weights = [layer.weight for layer in rounded.linear(encoder.model)]
    sizes = [weight.numel() for weight in weights]
    share = torch.tensor([NOISE / size**0.5 for size in sizes], device=device)
    cuda = device.type == "cuda"
    now, total = torch.zeros((), device=device), torch.zeros(len(LESSONS), device=device)
    optimizer = torch.optim.AdamW(
        parameters, lr=now if cuda else 1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda, capturable=cuda
    )

    def noise() -> list[Tensor]:
        strengths = torch.stack(torch._foreach_norm(weights)) * share
        drawn = torch.randn(sum(sizes), device=device).split(sizes)
        return [each.view_as(w) * strength for each, w, strength in zip(drawn, weights, strengths, strict=True)]

    def step() -> None:
        index = (torch.rand(batch, device=device) * len(ids)).long()
        chosen, want, seen = ids[index].long(), wanted[index].long(), mask[index]
        with torch.no_grad():
            moved = noise()
            torch._foreach_add_(weights, moved)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            states = embed(encoder, chosen, seen)
        is_shape = (chosen[..., None] == shapes).any(-1)
        which = is_shape.cumsum(1)
        losses = []
        for k in range(make_text.THINGS):
            at = (is_shape & (which == k + 1)).float()
            losses.append(heads.loss((states * at[..., None]).sum(1), want[:, k : k + 1]))
        end = (seen.cumsum(1) == seen.sum(1, keepdim=True)) & (seen > 0)
        whole = (states * end[..., None]).sum(1)
        losses.append(last.loss(whole, want))
        losses.append(nn.functional.cross_entropy(behind(whole), grounds[index].long()))
        loss = torch.stack(losses).mean()
        loss.backward()
        with torch.no_grad():
            torch._foreach_sub_(weights, moved)
        total.add_(torch.stack(losses).detach())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    run = captured(step, optimizer) if graphed else step
    pace = Pace("text", steps, seconds)
    total.zero_()
    while pace.more():
        now.fill_(pace.rate(1e-3, warmup=100, decay=0.7))
        if not (graphed and cuda):
            optimizer.zero_grad()
        run()
        if pace.report():
            losses = (total / pace.since()).tolist()
            pace.say("loss of the " + ", ".join(f"{k} {value:.4f}" for k, value in zip(LESSONS, losses, strict=True)))
            total.zero_()
