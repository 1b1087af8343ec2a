#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine: python3 with torch, triton, pytest and
# pytest-benchmark; no network, nothing installed.
#
#     LARS_FUSED_SHA=$(git describe --always --dirty --abbrev=10 --exclude '*') ci/gpu.sh first
#
#     ci/gpu.sh first     tests; ResNet-50 and ViT-B/16 beside SGD(fused=True); profile; sanitizer
#     ci/gpu.sh second    the other cases, the peers, norms
#     ci/gpu.sh third     the tuner, the compiled peers
#     ci/gpu.sh           all three, one after the other
#     ci/gpu.sh PART...   parts by name: tests[:EXPR] bench[:EXPR] profile sanitize tune;
#                         EXPR is a pytest -k expression, such as bench:resnet50
#
# Each call takes less than LIMIT seconds (560), whatever hangs: every part has a limit of its own and
# is killed where it does not heed it. Each begins with a small step beside the portable path, and
# goes no further if that is wrong. What a part has measured is written as it goes and is copied away
# while the part runs.
#
# The folder of a commit, a GPU and a day is kept in KEEP (build/gpu, which git ignores); a later call
# adds to it. A copy goes to bench/results/, or, where OUT is set, as one archive to OUT, a name for
# each call. `python -m bench merge ARCHIVE...` puts together what several machines left.
#
# LARS_FUSED_SHA is the commit, with -dirty if so; it can be left out where the history is there.
# Figures of no commit may not be quoted, so nothing is run without one, unless UNQUOTABLE=1.
# PYTHON is the interpreter. TESTS_SECONDS, BENCH_SECONDS, PROFILE_SECONDS, SANITIZE_SECONDS,
# TUNE_SECONDS, REPORT_SECONDS: another limit for a part. GRACE: seconds from interrupt to kill (8).
set -uo pipefail
set -m # a part is a process group of its own, which can be interrupted and killed whole
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' ci/gpu.sh; }

first=(tests bench:first profile sanitize)
second=("bench:case or peers or norms")
third=(tune bench:compiled)
declare -A limits=(
    [smoke]=60 [tests]=190 [bench]=240 [profile]=80 [sanitize]=80 [tune]=280 [report]=40
    ["bench:first"]=95 ["bench:compiled"]=170 ["bench:case or peers or norms"]=345
)

case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
"")
    status=0
    for call in first second third; do bash ci/gpu.sh "$call" || status=1; done
    exit "$status"
    ;;
first) parts=("${first[@]}") ;;
second) parts=("${second[@]}") ;;
third) parts=("${third[@]}") ;;
*) parts=("$@") ;;
esac
for part in "${parts[@]}"; do
    case ${part%%:*} in
    tests | bench | profile | sanitize | tune) ;;
    *)
        printf 'no part %s; there are tests, bench, profile, sanitize and tune\n\n' "${part%%:*}" >&2
        usage >&2
        exit 2
        ;;
    esac
done

PYTHON=${PYTHON:-python3}
limits[report]=${REPORT_SECONDS:-${limits[report]}}
KEEP=${KEEP:-build/gpu}
deadline=$((SECONDS + ${LIMIT:-560}))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

quotable=--quotable
if [ -n "${UNQUOTABLE:-}" ]; then
    quotable=
    printf '\n    UNQUOTABLE: no figure of this run may be quoted anywhere\n\n' >&2
fi
if ! name=$(timeout -k 5 90 "$PYTHON" -m bench folder --keep "$KEEP" $quotable); then
    echo "Set LARS_FUSED_SHA to the commit of a clean tree (ci/gpu.sh --help), or UNQUOTABLE=1." >&2
    exit 2
fi
folder="$KEEP/$name"
archive="${OUT:-}/$name.$(date -u +%H%M%S).tar.gz"
mkdir -p "$folder" ${OUT:+"$OUT"}

# What there is so far, where it outlives this machine; an archive is replaced in one go.
save() {
    if [ -n "${OUT:-}" ]; then
        tar -czf "$KEEP/.$BASHPID" -C "$KEEP" "$name" 2>/dev/null # a file may grow meanwhile
        mv "$KEEP/.$BASHPID" "$archive"
    else
        mkdir -p bench/results
        cp -R "$folder" bench/results/
        rm -f "bench/results/$name/pieces.txt" # of the part that runs, see bench/supervise.py
    fi
}

exec 3>&1 4>&2 > >(exec tee -a "$folder/log.txt") 2>&1
tee=$!
(while sleep "${SAVE_SECONDS:-15}" && kill -0 $$; do save; done) >/dev/null 2>&1 3>&1 4>&1 &
saver=$!
disown "$saver" # it is killed, which is not worth a message
child=

# What has left its process group may hold the log open, so that tee goes on: not waited for.
# shellcheck disable=SC2329 # called by the trap
finish() {
    trap - EXIT
    kill -KILL -- "-$saver" ${child:+"-$child"} 2>/dev/null
    exec 1>&3 2>&4
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        kill -0 "$tee" 2>/dev/null || break
        sleep 0.2
    done
    save
    if [ -n "${OUT:-}" ]; then echo "results: $archive"; else echo "results: bench/results/$name"; fi
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

failed=0
begun=$SECONDS

# room PART: seconds that it may take, its limit or what is left but for the report.
room() {
    local variable seconds left=$((deadline - SECONDS - limits[report] - 15))
    [ "$1" != report ] || left=$((left + limits[report]))
    variable=${1%%:*}
    variable=${variable^^}_SECONDS
    seconds=${!variable:-${limits[$1]:-${limits[${1%%:*}]}}}
    echo $((seconds < left ? seconds : left))
}

# limited PART SECONDS COMMAND...: a part that hangs is ended, and the next one begins.
limited() {
    local part=$1 seconds=$2 start=$SECONDS status
    shift 2
    if [ "$seconds" -lt 2 ]; then
        echo "-- $part: not begun, the time is up"
        failed=1
        return 125
    fi
    timeout --signal=INT --kill-after="${GRACE:-8}" "$seconds" "$@" </dev/null &
    child=$!
    wait "$child"
    status=$?
    kill -KILL -- "-$child" 2>/dev/null # what it may have left behind
    child=
    [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || echo "$part: ended after $seconds s"
    echo "-- $part: $((SECONDS - start)) s, exit status $status"
    [ "$status" -eq 0 ] || failed=1
    save
    return "$status"
}

note_tests() { timeout -k 5 20 "$PYTHON" -m bench note "$folder" "tests=$1"; }

# Also asks whether `tests` is this project's and no other package's.
smoke='import tests.cases, bench.small_step; bench.small_step.main()'
if ! limited smoke "$(room smoke)" "$PYTHON" -c "$smoke"; then
    note_tests 1
    exit 1
fi

for part in "${parts[@]}"; do
    only=""
    case $part in *:*) only=${part#*:} ;; esac
    seconds=$(room "$part")
    case ${part%%:*} in
    tests)
        limited "$part" "$seconds" "$PYTHON" ci/test.py gpu ${only:+-- -k "$only"}
        status=$?
        # Some of the tests passing says nothing; one failing does.
        if [ -z "$only" ] || [ "$status" -ne 0 ]; then note_tests "$status"; fi
        ;;
    bench)
        limited "$part" "$seconds" "$PYTHON" -m bench run --output "$folder" --only "$only" \
            --seconds $((seconds - 30)) --no-report
        ;;
    *) limited "$part" "$seconds" "$PYTHON" -m bench "$part" "$folder" --seconds $((seconds - 12)) ;;
    esac
done
[ ! -e "$folder/raw.csv" ] ||
    limited report "$(room report)" "$PYTHON" -m bench report "$folder"
echo "-- ${*:-all}: $((SECONDS - begun)) s"
exit "$failed"
