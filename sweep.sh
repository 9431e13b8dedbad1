#!/usr/bin/env bash
# The experiment: gpt, gpt_v2 and 54 configurations of gpt_v3. Each run appends a row of losses to a CSV.
# Stop the sweep and start it again at any time: a run whose row is in the CSV is not repeated.
usage="usage: [JOBS=n] [SAVE=dir] bash sweep.sh [--laptop] [--csv FILE] [--only PATTERN] [--dry-run] [-- ...]
--laptop: 1/32 of the size, for a CPU; --only: runs that match, as 'n_embd 384'; --dry-run: print the commands
--: what follows goes to every run; JOBS: runs at once (default: one per GPU or core); SAVE: folder in which
gpt_v3's runs are kept, to continue after a stop"
here=$(cd "$(dirname "$0")" && pwd)
[ -f "$here/gpt.py" ] || here=${SLURM_SUBMIT_DIR:-$here} # sbatch runs a copy of this file
csv=$here/results/sweep.csv only="" dry_run=""
widths="384 768" depths="6 8 12" preset=(--data "$here/input.txt")
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --laptop) widths="96 192" depths="3 4 6" # text, batch and parameters are 1/32 of the published
            preset=(--data "$here/results/laptop.txt" --batch_size 8 --block_size 64 --max_iters 5000
                --eval_interval 500 --eval_iters 60 --learning_rate 5e-4 --dropout 0.06) ;;
        --csv) shift; csv=${1:-} ;;
        --only) shift; only=${1:-} ;;
        --dry-run) dry_run=yes ;;
        --help) echo "$usage"; exit ;;
        *) csv="" ;;
    esac
    [ -n "$csv" ] || { echo "$usage" >&2; exit 2; }
    shift
done
shift # the --, if there is one
runs=$( # the widths alternate, so that the time per run changes little
    for gpt in gpt gpt_v2; do echo "$gpt.py --n_embd ${widths%% *} --n_head 6 --n_layer ${depths%% *}"; done
    for pe in randn sinpe rope; do for head in 6 8 12; do for layer in $depths; do for embd in $widths; do
        echo "gpt_v3.py --pe $pe --n_embd $embd --n_head $head --n_layer $layer"
    done; done; done; done
)
runs=$(grep -e "$only" <<< "$runs" | sed -n "${SLURM_ARRAY_TASK_ID:+$((SLURM_ARRAY_TASK_ID + 1))}p")
[ -n "$runs" ] || { echo "sweep.sh: error: there is no such run" >&2; exit 2; }
run() { # $1 is a line of $runs, and the rest are the flags for every run
    read -ra own <<< "$1"
    command=(python3 "$here/${own[0]}" "${own[@]:1}" "${@:2}" --csv "$csv" --once --max_new_tokens 0)
    saved=${SAVE:-}/$(cksum <<< "$*" | cut -d " " -f 1).pt flag=--save
    [ ! -e "$saved" ] || flag=--resume
    [ -z "${SAVE:-}" ] || [ "${own[0]}" != gpt_v3.py ] || command+=("$flag" "$saved")
    [ -z "$dry_run" ] || { printf "%q " "${command[@]}"; echo; return; }
    [ ! -e "$log/stop" ] || return
    echo "start: $1"
    IFS=, read -ra gpu <<< "$gpus"
    [ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES=${gpu[slot % ${#gpu[@]}]}
    "${command[@]}" > "$log/$$" 2> "$log/$$.err" && { echo "$1: $(tail -n 1 "$log/$$")"; return; }
    status=$?
    echo "$1" >> "$log/failed"
    # a wrong flag or file is said once, and ends the sweep
    [ $status = 2 ] && ! mkdir "$log/stop" 2> /dev/null || cat "$log/$$.err" >&2
}
[ -z "$dry_run" ] || while read -r line; do run "$line" "${preset[@]}" "$@"; done <<< "$runs"
[ -z "$dry_run" ] || exit 0
gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --list-gpus 2> /dev/null | awk '{ print NR - 1 }' | paste -sd , -)}
jobs=$(tr , '\n' <<< "$gpus" | grep -c .) || jobs=$(getconf _NPROCESSORS_ONLN)
[ -n "$gpus" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "${SAVE:-.}"
log=$(mktemp -d) && trap 'rm -rf "$log"' EXIT && trap 'touch "$log/interrupted"' INT
export here csv gpus log TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-4}"
export -f run
xargs -P "${JOBS:-$jobs}" -I {} ${gpus:+--process-slot-var=slot} \
    bash -c 'run "$@"' run {} "${preset[@]}" "$@" <<< "$runs" | (trap "" INT && cat)
[ ! -e "$log/stop" ] || exit 2
[ ! -e "$log/interrupted" ] || { echo "interrupted; rerun to continue" >&2; exit 130; }
[ ! -s "$log/failed" ] || { echo "$(grep -c . "$log/failed") runs failed; rerun to continue" >&2; exit 1; }
echo "done: the rows are in $csv"
