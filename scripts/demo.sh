#!/usr/bin/env bash
# The whole story on any machine: teach the bundled tiny FLUX a style it cannot draw, at NF4, then draw the same
# prompts at four precisions without and with the adapter. Running it again repeats nothing that is done.
source "$(dirname "$0")/setup.sh" ""
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
run=runs/demo
if [ ! -f runs/demo-pictures/metadata.jsonl ]; then
    .venv/bin/python scripts/tiny/make_style.py runs/demo-pictures
fi
.venv/bin/python train/train.py experiment=demo
if [ $run/compare/results.json -nt $run/adapter/pytorch_lora_weights.safetensors ]; then
    .venv/bin/python -m infer.report $run/compare
else
    .venv/bin/python infer/compare.py experiment=demo_compare
fi
echo "pictures during training: $run/previews"
