#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine: python3 with torch, triton, pytest and
# pytest-benchmark; no network, nothing installed, run from the checkout. Under 9 minutes.
#
#     ci/gpu.sh                               tests, bench, profile: one results folder
#     ci/gpu.sh tests bench:resnet50 profile  named parts; after the colon a pytest -k expression
#     ci/gpu.sh tune                          sweep the launch constants
#
# A small step is checked first, whatever the parts.
#
# PYTHON: the interpreter. OUT: where the folder goes (default bench/results). LARS_FUSED_SHA: the
# commit (with -dirty if so), where the tree came without its history. Every part has its own time
# limit, and the report is made from what the parts left, whatever became of them.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests bench profile)
for part in "${parts[@]}"; do
    case ${part%%:*} in
    tests | bench | profile | tune) ;;
    *)
        echo "no part ${part%%:*}; there are tests, bench, profile and tune" >&2
        exit 2
        ;;
    esac
done

folder="$OUT/$("$PYTHON" -c 'from bench.environment import folder; print(folder().name)')" || exit 1
mkdir -p "$folder"
failed=0

# limited SECONDS COMMAND...: a part that hangs is ended, and the next one begins.
limited() {
    local seconds=$1 start=$SECONDS status
    shift
    timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1 | tee -a "$folder/log.txt"
    status=${PIPESTATUS[0]}
    [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || echo "$part: ended after $seconds s" | tee -a "$folder/log.txt"
    echo "-- $part: $((SECONDS - start)) s, exit status $status" | tee -a "$folder/log.txt"
    [ "$status" -eq 0 ] || failed=1
    return "$status"
}

# One small step beside the portable path, before anything else takes the machine's time: a kernel
# that waits for ever or cannot start ends the run here.
smoke='
import torch
from lars_fused import LARS
torch.manual_seed(0)
ends = []
for backend in ("triton", "torch"):
    params = [torch.nn.Parameter(torch.ones(n, device="cuda").cumsum(0)) for n in (50_000, 3)]
    optimizer = LARS(params, weight_decay=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    ends.append(torch.cat([p.detach().double() for p in params]))
torch.testing.assert_close(*ends, rtol=1e-6, atol=0)
print("a small step agrees with the portable path")
'
part=smoke
limited 60 "$PYTHON" -c "$smoke" || exit 1

for part in "${parts[@]}"; do
    only=""
    case $part in *:*) only=${part#*:} ;; esac
    case ${part%%:*} in
    tests)
        limited 170 "$PYTHON" ci/test.py gpu ${only:+-- -k "$only"}
        "$PYTHON" -m bench note "$folder" "tests=$?"
        ;;
    bench)
        limited 240 "$PYTHON" -m bench run --output "$folder" --seconds 190 --only "$only" \
            --no-report
        ;;
    profile) limited 75 "$PYTHON" -m bench profile "$folder" --seconds 60 ;;
    tune) limited 200 "$PYTHON" -m bench tune "$folder" --seconds "${TUNE_SECONDS:-160}" ;;
    esac
done
part=report
[ ! -e "$folder/raw.csv" ] || limited 30 "$PYTHON" -m bench report "$folder"
echo "results: $folder"
exit "$failed"
