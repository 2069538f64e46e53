"""A LoRA file of any program -> its tensors by layer and part, before anything is said of what they mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open

from infer.adapter.factors import NAMES, kind_of_parts
from infer.adapter.foreign_files import reason
from infer.adapter.layer_names import families_with
from infer.adapter.lycoris import PARTS
from infer.program.paths import POINTER, kind_of_file

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = re.compile(
    r"(base_model\.model\.|transformer\.|model\.diffusion_model\.|diffusion_model\.|module\.|lora_unet_+"
    r"|lora_transformer[._]|lycoris_)+"
)
# what torch.compile, FSDP and activation checkpointing put between a module's names
_WRAPPER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# an adapter's own name may stand behind A and B, as PEFT holds them
_KEY = re.compile(
    r"(?P<name>.+?)\."
    r"((?P<down>(lora_A(\.(?P<down_of>[^.]+))?|lora_down|lora\.down|down)\.weight)"
    r"|(?P<up>(lora_B(\.(?P<up_of>[^.]+))?|lora_up|lora\.up|up)\.weight)"
    r"|(?P<alpha>alpha)"
    rf"|(?P<lycoris>{PARTS})"
    r"|(?P<magnitude>(?P<scale>dora_scale)|lora_magnitude_vector(\.[^.]+)?(\.weight)?))"
)
_TEXT = re.compile(
    r"(base_model\.model\.)?(lora_|lycoris_)?"
    r"(te\d?[._]|text_encoders?(_\d)?[._]|text_model[._]|clip_[lg][._]|t5(xxl)?[._]|bundle_emb\.|emb_params|string_to_)"
)


class Contents(NamedTuple):
    """What an adapter's file holds."""

    file: Path
    header: dict[str, str]
    keys: list[str]  # of all that is for the transformer
    found: dict[str, dict[str, Tensor]]  # by the file's own name of a layer, without prefixes, and by part


def read_contents(file: Path, drop_text_encoder: bool = False) -> Contents:
    """Sort the tensors of an adapter's file.

    Raises:
        ValueError: it is unreadable, not finite, a key is unknown, or it adapts the text encoder too and that is not to
            be left out.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            header = reader.metadata() or {}
            state = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no LoRA file that can be read: {other_kind(file) or error}") from error
    if not state:
        raise ValueError(f"{file} holds no tensor: it was saved empty; save it again with the program that trained it")
    text = [key for key in state if _TEXT.match(key)]
    if text and not drop_text_encoder:
        words = all(key.startswith(("bundle_emb.", "emb_params", "string_to_")) for key in text)
        what = "brings embeddings of words of its own for" if words else "adapts"
        raise ValueError(
            f"{file} {what} the text encoder too ({len(text)} tensors, such as {text[0]}), which is not done here: "
            "texts are encoded once, before training and drawing, and kept; infer/convert.py with "
            "drop_text_encoder=true writes a file without them"
        )
    state = {key: _number(key, value) for key, value in state.items() if key not in set(text)}
    odd = [key for key, value in state.items() if not value.is_floating_point()]
    if odd:
        raise ValueError(f"{file} holds {state[odd[0]].dtype} in {odd[0]}; a LoRA file holds floating-point numbers")
    found: dict[str, dict[str, Tensor]] = {}
    unknown, adapters = [], set()
    for key in state:
        match = _KEY.fullmatch(key)
        name = _WRAPPER.sub("", match["name"]) if match else ""
        name = _PREFIX.sub("", name, count=1)
        if match is None or not families_with([name]):
            unknown.append(key)
            continue
        if match["scale"]:
            _check_scale(file, key, state[key])
        if match["alpha"] and state[key].numel() != 1:
            raise ValueError(
                f"{file} has an alpha of the shape {list(state[key].shape)} in {key}, where one number says how strong "
                "a layer is; convert the file with the program that made it"
            )
        part = match["lycoris"] or next(part for part in ("down", "up", "alpha", "magnitude") if match[part])
        if part in ("down", "up"):
            adapters.add(match[f"{part}_of"] or "")
        if part in found.setdefault(name, {}) and len(adapters) == 1:
            raise ValueError(f"{file} says twice what {part} of {name} is; it mixes two formats, keep one of them")
        found[name][part] = state[key]
    if unknown or not found:
        if text and not state:
            raise ValueError(f"{file} adapts the text encoder alone, which is not done here; nothing of it is left")
        raise ValueError(
            f"{file} cannot be used: {len(unknown)} of {len(state)} keys are unknown"
            f"{' (' + min(unknown) + ', ...)' if unknown else ''}; {reason(unknown, bool(found))}"
        )
    if len(adapters) > 1:
        names = ", ".join(repr(name) for name in sorted(adapters))
        raise ValueError(f"{file} holds several adapters ({names}); save the one that is meant alone")
    bad = [key for key, value in state.items() if not value.float().isfinite().all()]
    if bad:
        raise ValueError(f"{file} is not finite in {len(bad)} tensors ({bad[0]}, ...); train it again")
    for name, parts in found.items():
        if kind_of_parts(parts) and parts.keys() & {"down", "up"}:
            kind = NAMES[kind_of_parts(parts) or ""]
            raise ValueError(f"{file} has LoRA and {kind} for {name}; it mixes two adapters, keep one of them")
    return Contents(file, header, list(state), found)


def other_kind(file: Path) -> str | None:
    """What a file is that is no safetensors file, where its first bytes tell, and the mend."""
    return {
        "gguf": "it is a GGUF file, which holds a whole model; give a LoRA file",
        "pickle": "it is a pickle, which could run programs; ask for the .safetensors of it",
        "archive": "it is an archive; unpack it",
        "page": "it is a web page, as a download saves that needed a login; download it again",
        "empty": "it is empty, as a download that broke off; download it again",
        "pointer": POINTER,
    }.get(kind_of_file(file))


def _check_scale(file: Path, key: str, scale: Tensor) -> None:
    """LyCORIS and OneTrainer write DoRA's magnitude of rows as [out, 1], which is PEFT's, and of columns as [1, in].

    Raises:
        ValueError: it is of columns, or nothing tells.
    """
    if scale.ndim != 2 or scale.shape[1] != 1:
        raise ValueError(
            f"{file} is DoRA whose magnitude {key} of the shape {list(scale.shape)} is not one of rows, [out, 1], "
            "which alone is read here; train it with the magnitude over outputs (LyCORIS' wd_on_out=True), or merge it "
            "with the program that made it"
        )


def _number(key: str, value: Tensor) -> Tensor:
    """A tensor in a type that can be reckoned with: fp8 in bf16, which holds all its numbers, whole alphas in fp32."""
    import torch

    if "float8" in str(value.dtype):
        return value.to(torch.bfloat16)
    whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
    return value.float() if whole and key.endswith(".alpha") and value.numel() == 1 else value
