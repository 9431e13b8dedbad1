#!/usr/bin/env bash
# The experiment: gpt, gpt_v2 and 54 configurations of gpt_v3, one CSV row of final losses each.
# Stop it and start it again at any time: a run whose row is there is skipped.
usage="usage: [JOBS=n] [SAVE=dir] bash sweep.sh [--tiny] [--dry-run] [--csv FILE] [-- FLAGS FOR EVERY RUN]"
here=$(cd "$(dirname "$0")" && pwd)
[ -f "$here/gpt.py" ] || here=${SLURM_SUBMIT_DIR:-$here} # sbatch runs a copy of this file
csv=$here/results/sweep.csv widths="384 768" depths="6 8 12" tiny=() dry_run=""

fail() { echo "sweep.sh: error: $1" >&2; exit 2; }

while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --tiny) widths="96 192" depths="3 4 6" tiny=(--batch_size 16 --block_size 32 --max_iters 1000
                --eval_interval 500 --eval_iters 50 --learning_rate 2e-3) ;;
        --dry-run) dry_run=yes ;;
        --csv) shift; case ${1:-} in "") fail "$usage" ;; /*) csv=$1 ;; *) csv=$PWD/$1 ;; esac ;;
        *) fail "$usage" ;;
    esac
    shift
done
shift # the --, if any
set -- "${tiny[@]}" --sample_chars 0 "$@" # what every run gets; the last of a flag wins
[ -z "${SAVE:-}" ] || SAVE=$(mkdir -p "$SAVE" && cd "$SAVE" && pwd) || fail "SAVE=$SAVE cannot be made"
case ${JOBS:-1} in 0* | *[!0-9]*) fail "JOBS=$JOBS is not the number of runs at once" ;; esac

# Depth varies fastest: blocks that were compiled serve every depth, and at the input every encoding.
runs=()
for script in gpt gpt_v2; do runs+=("$script --n_embd ${widths%% *} --n_head 6 --n_layer ${depths%% *}"); done
for n_embd in $widths; do for n_head in 6 8 12; do for pe in randn sinpe rope; do for n_layer in $depths; do
    runs+=("gpt_v3 --pe $pe --n_embd $n_embd --n_head $n_head --n_layer $n_layer")
done; done; done; done
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # one task of an array, one run
    [ -n "${runs[SLURM_ARRAY_TASK_ID]:-}" ] || fail "the runs are --array=0-$((${#runs[@]} - 1))"
    runs=("${runs[SLURM_ARRAY_TASK_ID]}")
fi

# One thread a run, whatever JOBS is: threads of runs side by side would fight for the cores, and their
# number changes the order of sums, and so the losses.
commands=()
for run in "${runs[@]}"; do
    commands+=("$(printf 'cd %q && OMP_NUM_THREADS=%q python3 %s.py %s' "$here" "${OMP_NUM_THREADS:-1}" \
        "${run%% *}" "${run#* }"; printf ' %q' "$@" --csv "$csv")")
    if [ -n "${SAVE:-}" ] && [ "${run%% *}" = gpt_v3 ]; then # a run that was cut off goes on
        file=$(printf %q "$SAVE/gpt_v3-$(echo "$run $*" | cksum | cut -d ' ' -f 1).pt")
        commands[${#commands[@]} - 1]+=" \$([ -e $file ] && echo --resume || echo --save) $file"
    fi
done
[ -z "$dry_run" ] || { printf '%s\n' "${commands[@]}"; exit; }

# Prints the GPUs and the number of runs at once, then the index and the relative cost of each run to do.
plan() {
    cd "$here" && python3 - "$csv" "$(printf '%s\n' "${runs[@]}")" "$@" <<'EOF'
import contextlib, csv, fcntl, importlib, io, os, sys
import torch, gpt

path, runs, flags = sys.argv[1], sys.argv[2].splitlines(), sys.argv[3:]
sys.argv[0] = "sweep.sh"  # in error messages
gpt.append_row(path)  # refuses what is not a CSV of the scripts
lock = fcntl.LOCK_SH if "SLURM_ARRAY_TASK_ID" in os.environ else fcntl.LOCK_EX
try:
    fcntl.flock(9, lock | fcntl.LOCK_NB)
except BlockingIOError:
    print(f"sweep.sh: waiting for the runs of another sweep into {path} to end", file=sys.stderr)
    fcntl.flock(9, lock)
rows = []
if os.path.exists(path):
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
if any(None in row or None in row.values() for row in rows):
    gpt.fail(f"--csv {path}: it has a row with too many or too few cells")

todo, errors, device = [], [], torch.device("cpu")
for index, run in enumerate(runs):
    experiment, *own = run.split()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as error:
            config = vars(importlib.import_module(experiment).parse_args(own + flags))
    except SystemExit:  # say gpt, which has no --pe_at: that run will fail by itself
        errors.append(error.getvalue())
        todo.append(f"{index} 0")
        continue
    device = config["device"]
    config |= {"experiment": experiment, "pe_type": config.get("pe", "None")}
    row = {name: "" if config[name] is None else str(config[name]) for name in gpt.COLUMNS
           if name in config and name not in ("device", "compile")}  # what was run, not where
    if not any(row.items() <= old.items() for old in rows):
        todo.append(f"{index} {config['n_layer'] * config['n_embd'] * (config['n_embd'] + 400)}")
        rows.append(row)  # a flag may make two runs the same
if len(errors) == len(runs):
    sys.stderr.write(errors[0])
    sys.exit(2)
gpus = range(torch.cuda.device_count()) if str(device) == "cuda" else ()
visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, gpus))) if gpus else ""
print(visible, len(gpus) or (os.cpu_count() if device.type == "cpu" else 1), *todo, sep="\n")
EOF
}

{ exec 9<> "$csv.lock"; } 2> /dev/null || fail "--csv $csv: its folder is not there or cannot be written to"
plan=$(plan "$@") || exit # file 9 stays locked until this sweep and its last run have ended, kill -9 or not
todo=() costs=() total=0 spent=0 pids=() running=() finished=0 failed=() SECONDS=0
{
    IFS=, read -r -a gpus
    read -r jobs
    while read -r index cost; do todo+=("$index") costs[index]=$cost total=$((total + cost)); done
} <<< "$plan"
jobs=${JOBS:-$jobs}

# Waits for any run to end, counts it and frees its slot.
finish() {
    local slot status index
    while true; do
        for slot in "${!pids[@]}"; do
            kill -0 "${pids[slot]}" 2> /dev/null && continue
            wait "${pids[slot]}" 2> /dev/null # without "Exit 1" in bash 3.2
            status=$? index=${running[slot]}
            if [ $status -eq 0 ]; then finished=$((finished + 1))
            else failed+=("failed with exit status $status: ${runs[index]}"); fi
            spent=$((spent + costs[index]))
            unset "pids[slot]"
            return
        done
        sleep 0.2 & wait $!
    done
}

stop() {
    trap "" HUP INT TERM
    { for pid in $(jobs -p); do kill -- "-$pid"; done; wait; } 2> /dev/null
    echo "sweep.sh: stopped; start it again to go on" >&2
    exit "$1"
}
trap "stop 129" HUP
trap "stop 130" INT
trap "stop 143" TERM

set -m # a run leads a process group, which stop ends as a whole
for index in "${todo[@]}"; do
    [ ${#pids[@]} -lt "$jobs" ] || finish
    for ((slot = 0; ${pids[slot]:-0}; slot++)); do :; done
    eta=""
    [ "$spent" -eq 0 ] || eta=$((SECONDS * (total - spent) / spent / 60))
    echo "run $((index + 1)) of ${#runs[@]}: ${runs[index]}${eta:+, eta $eta minutes}"
    (
        [ ${#gpus[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES="${gpus[slot % ${#gpus[@]}]}"
        eval "${commands[index]}"
    ) < /dev/null > /dev/null &
    pids[slot]=$! running[slot]=$index
done
while [ ${#pids[@]} -gt 0 ]; do finish; done

[ ${#failed[@]} -eq 0 ] || printf '%s\n' "${failed[@]}"
echo "done $finished, skipped $((${#runs[@]} - ${#todo[@]})), failed ${#failed[@]}" \
    "in $((SECONDS / 60)) minutes: $csv"
[ ${#failed[@]} -eq 0 ]
