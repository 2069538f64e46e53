"""The reason why the keys of a LoRA file are not read: the format or the model that they belong to."""

import re
from collections.abc import Collection

from infer.family.find import FAMILIES

FAMILY = " or ".join(family.NAME for family in FAMILIES)
CHOOSE = f"choose a LoRA file of {FAMILY}"
NOT_LORA = (
    "adapters are not LoRA; merge it into the weights with the program that made it, and give those as model.path"
)
# the first that a key of the file holds says why; names with dots or, as kohya writes them, underscores
KINDS = (
    (r"lokr_t|hada_t", "its update has three factors (LyCORIS' Tucker form); merge it with LyCORIS"),
    (r"oft_blocks|oft_diag",
     "it is LyCORIS' or kohya's OFT of outputs, and OFT of inputs alone (PEFT's and OneTrainer's oft_R) is read; merge "
     "it into the weights with the program that made it, and give those as model.path"),
    (r"boft_", f"BOFT {NOT_LORA}"),
    (r"oft_", f"OFT of another form than PEFT's oft_R is not read: such {NOT_LORA}"),
    (r"vera_lambda", f"VeRA {NOT_LORA}"),
    (r"ia3_|\.on_input$", f"IA3 {NOT_LORA}"),
    (r"\.[ab][12]\.weight$", f"GLoRA {NOT_LORA}"),
    (r"lora_mid|\.lora_mid\.", "its update has three factors (LyCORIS' Tucker form); merge it with LyCORIS"),
    (r"scale_weight|weight_scale|scaled_fp8|scale_input", "its fp8 numbers have scales of their own; save it in bf16"),
    (r"_norm\.scale|reshape_weight|set_weight",
     "it replaces norms too, as FLUX.1's Canny and Depth adapters do, which are for another model"),
    (r"lora_B(\.\w+)?\.bias",
     "it has biases of its own, as FLUX.1's Canny and Depth adapters do, which are for another model"),
    (r"lora_embedding_", "it adapts embeddings, which a transformer has not"),
    (r"\.(diff_b|[wb]_norm)$", "it replaces biases or norms too"),
    (r"\.diff$",
     "it holds whole differences of weights (LyCORIS' full); merge it into the weights with the program that made it, "
     "and give those as model.path"),
    (r"[ab]_to_qkv|to_qkv_mlp(?!_proj)|[ab]_to_out|norm1_[ab]",
     "they are DiffSynth-Studio's own names for FLUX.1; export it there with --align_to_opensource_format"),
)  # fmt: skip
OTHERS = (
    (r"(down|up)_blocks|mid_block|(input|output|middle)_blocks?", "Stable Diffusion or SDXL"),
    (r"joint_blocks|joint_transformer", "Stable Diffusion 3"),
    (r"mode_blocks[._]\d", "FLUX.3"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)", "Qwen-Image"),
    (r"(^|[._])transformer_blocks[._]\d+[._]attn[12][._]", "LTX-Video or PixArt"),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)", "Wan"),
    (r"(^|[._])layers[._]\d+[._](attention|feed_forward|adaLN|attn)", "Lumina or Z-Image"),
)
BLOCK = re.compile(r"(double_blocks|single_blocks|transformer_blocks)[._]\d+[._]")
PARTS = re.compile(r"lora|\.(up|down|alpha)(\.|$)|magnitude")


def reason(unknown: Collection[str], known: bool) -> str:
    """Why these keys are not read; known: other keys of the file are."""
    for mark, said in KINDS:
        if any(re.search(mark, key) for key in unknown):
            return said
    if unknown and not known and not any(PARTS.search(key) for key in unknown):
        model = any(BLOCK.search(key) for key in unknown)
        return f"it is a checkpoint and no adapter; {'give it as model.path' if model else CHOOSE}"
    for mark, name in OTHERS:
        if any(re.search(mark, key) for key in unknown):
            return f"it is for {name}; {CHOOSE}"
    if known or any(BLOCK.search(key) for key in unknown):
        return f"they name nothing in {FAMILY} that is adapted here; convert the file with the program that made it"
    return CHOOSE
