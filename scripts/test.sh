#!/usr/bin/env bash
# All tests, offline, on the bundled model. Arguments go to pytest: bash scripts/test.sh -k adapter
source "$(dirname "$0")/setup.sh" test
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
exec .venv/bin/python -m pytest "$@"
