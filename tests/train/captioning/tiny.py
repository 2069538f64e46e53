"""Random tiny captioners, made on the spot: Florence-2, LLaVA and Qwen2.5-VL, which are asked by a chat template."""

from pathlib import Path

import torch
import transformers as t
from tokenizers import pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ["<s>", "</s>", "<pad>", "<image>"]
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} ASSISTANT:"
)


def tokenizer() -> t.PreTrainedTokenizerBase:
    """Of bytes, which needs no vocabulary."""
    vocab = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL])}
    made = t.Qwen2Tokenizer(
        vocab=vocab, merges=[], bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    return made


def make_florence(folder: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {"model_type": "bart", "vocab_size": len(words), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "max_position_embeddings": 512, "decoder_start_token_id": words.eos_token_id, **ids}  # fmt: skip
    eyes = {"depths": (1, 1, 1, 1), "embed_dim": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "num_groups": (1, 1, 2, 2),
            "window_size": 2, "projection_dim": 32}  # fmt: skip
    config = t.Florence2Config(text_config=text, vision_config=eyes, image_token_id=words.image_token_id, **ids)
    model = t.Florence2ForConditionalGeneration(config)
    model.generation_config = t.GenerationConfig(decoder_start_token_id=words.eos_token_id, **ids)
    model.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    eye = CLIPImageProcessorPil(size=size, do_center_crop=False)
    eye.image_seq_length = 5  # 2 x 2 places and their mean
    t.Florence2Processor(eye, words).save_pretrained(folder)
    return folder


def make_llava(folder: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    text = t.LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                         pad_token_id=words.pad_token_id)  # fmt: skip
    eyes = t.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=16)  # fmt: skip
    model = t.LlavaForConditionalGeneration(
        t.LlavaConfig(text_config=text, vision_config=eyes, image_token_id=words.image_token_id)
    )
    model.generation_config = t.GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    eye = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    t.LlavaProcessor(
        eye, words, patch_size=16, vision_feature_select_strategy="default", chat_template=CHAT, image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_qwen(folder: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": QWEN})
    words.chat_template = CHAT.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                   words.convert_tokens_to_ids(QWEN), strict=True))  # fmt: skip
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            **ends}  # fmt: skip
    eyes = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 16,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [0]}  # fmt: skip
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **ids, **ends)
    model = t.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = t.GenerationConfig(**ends)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112).save_pretrained(folder)
    return folder
