#!/usr/bin/env bash
# The golden numbers of tests/golden/metrics.json, by the reference programs in an environment of their own, build/agree.
# They need torchvision, which inkdrop does not; its operators in C++ are declared by agree.py and never called.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=tests # for tests/agreement.py
export OMP_NUM_THREADS=1

env=build/agree
test -x "$env/bin/python" || "${PYTHON:-python3}" -m venv "$env"
"$env/bin/python" -m pip install --quiet -c constraints.txt torch numpy scipy pillow
"$env/bin/python" -m pip install --quiet tqdm requests scikit-learn==1.9.1 scikit-image==0.26.0
"$env/bin/python" -m pip install --quiet --no-deps torchvision==0.28.0 pytorch-fid==0.3.0 torch-fidelity==0.4.0 \
    clean-fid==0.1.35 prdc==0.2 lpips==0.1.4 piq==0.8.0
"$env/bin/python" bench/agree.py "$@"
