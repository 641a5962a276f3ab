#!/usr/bin/env bash
# Makes an environment of its own with packages that train with Lightning, and trains each with and without the callback,
# and cuts each.
# Several gigabytes of packages and a few minutes, so it is run by hand:
#   bash examples/packages/run.sh [folder of the environment] [names of packages]
set -euo pipefail
project=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$(mktemp -d)}
shift || true
if [ ! -x "$folder/bin/python" ]; then
  python3 -m venv "$folder"
  # torch and torchvision have to fit together, so they come first.
  "$folder/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1
  "$folder/bin/pip" install --quiet lightning==2.6.6 pytorch-lightning==2.6.6 pytorch-forecasting==1.8.0 \
    scvi-tools==1.4.2 chemprop==2.3.1 lightly==1.6.0 torchgeo==0.8.1 requests "$project"
fi
"$folder/bin/pip" install --quiet --no-deps --force-reinstall "$project"
failed=0
for script in observe cut; do
  OMP_NUM_THREADS=1 "$folder/bin/python" -W ignore "$project/examples/packages/$script.py" "$@" || failed=1
done
exit $failed
