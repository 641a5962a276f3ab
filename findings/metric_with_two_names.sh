#!/usr/bin/env bash
# nn.Module.modules() yields a torchmetrics metric with two names twice, if its state changes while one iterates.
#
# torch 2.13.0, torchmetrics 1.9.0. modules() remembers what it has yielded in a set. A Metric's hash is made of the ids
# of its states, so after a state has been replaced (as reset, and every update of a metric that sums, do) the set does
# not know it any more: each module is documented to be returned only once, and this one comes again. Code that walks
# over a model, puts the states of metrics aside and gives the metrics fresh ones then saves the fresh ones as well.
#
# Seen: 1 visit without a change, 2 visits with reset() in the loop.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import torchmetrics
from torch import nn
from torchmetrics import MeanMetric, Metric

model = nn.Module()
model.accuracy = MeanMetric()
model.all_metrics = nn.ModuleDict({"accuracy": model.accuracy})
model.accuracy.update(1.0)
untouched = sum(isinstance(module, Metric) for module in model.modules())
visits = 0
for module in model.modules():
    if isinstance(module, Metric):
        visits += 1
        module.reset()
print(torch.__version__.split("+")[0], torchmetrics.__version__, untouched, visits)
assert (untouched, visits) == (1, 2), "torch or torchmetrics behave otherwise now"
PY
echo "as described"
