#!/usr/bin/env bash
# An empty TorchFunctionMode changes what nn.TransformerEncoder returns, by far more than rounding.
#
# torch 2.13.0 (CPU). In evaluation without gradients, and with a padding mask, nn.TransformerEncoder takes a fast path
# that works on nested tensors and returns zeros at the padded positions. Any active TorchFunctionMode, also one that
# only hands calls on, turns that path off; the ordinary path returns values other than zero there. So a profiler or a
# monitor that is built on such a mode changes a mean over all positions, and with it a validation loss that is logged.
#
# Seen: mean of the squared output over all positions 0.5625 plain, 1.0 with the mode; largest magnitude at a padded
# position 0.0 and 2.6.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class HandOn(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
encoder = nn.TransformerEncoder(layer, 2).eval()
x, padding = torch.randn(4, 8, 16), torch.zeros(4, 8, dtype=torch.bool)
padding[:2, 1:] = True
with torch.no_grad():
    plain = encoder(x, src_key_padding_mask=padding)
    with HandOn():
        watched = encoder(x, src_key_padding_mask=padding)
means = [round(float(out.square().mean()), 4) for out in (plain, watched)]
padded = [round(float(out[padding].abs().max()), 1) for out in (plain, watched)]
print(torch.__version__.split("+")[0], means, padded)
same = torch.allclose(plain[~padding], watched[~padding], atol=1e-5)
assert same and means == [0.5625, 1.0] and padded[0] == 0 < 1 < padded[1], "torch behaves otherwise now"
PY
echo "as described"
