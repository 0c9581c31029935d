#!/usr/bin/env bash
# Snakemake runs this in the new conda environment, from the folder in which it was started: a clone, or a folder of the
# user's.
set -euo pipefail
if [ -f workflow/envs/lorabench.post-deploy.sh ]; then
    python -m pip install -c constraints.txt -e .
else
    python -m pip install lorabench
fi
