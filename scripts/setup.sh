#!/usr/bin/env bash
# Make .venv and install the project into it; nothing happens where that is done. Use: source scripts/setup.sh [extra]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=".${1:+[$1]}"
stamp=".venv/.installed${1:+-$1}"
if [ ! -x .venv/bin/python ]; then
    for python in python3 python3.13 python3.12 python3.11; do
        if command -v "$python" > /dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            break
        fi
        python=
    done
    if [ -z "$python" ]; then
        echo "error: Python 3.11 or newer is needed, and none was found" >&2
        exit 2
    fi
    echo "making .venv with $($python --version)"
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "error: $python cannot make a virtual environment; install its venv module (Debian: python3-venv)" >&2
        exit 2
    fi
fi
if ! cmp -s pyproject.toml "$stamp"; then
    echo "installing the project and what it needs: the first time a download of 1 to 4 GB and some minutes"
    # a line a package, so that one sees that it goes on; pip's own errors go to stderr
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -e "$target" |
        sed -nu -E 's/^ *(Downloading|Building|Installing|Successfully installed)( [^ ]+)?.*/  \1\2/p'
    cp pyproject.toml "$stamp"
fi
