#!/usr/bin/env bash
# All tests, offline, on the bundled model. Arguments go to pytest: bash scripts/test.sh -k adapter
# Files of tests are spread over processes of one thread each, the dearest first (tests/conftest.py), so that none is left
# alone with the last; -n 0 runs all in one.
source "$(dirname "$0")/setup.sh" test
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
