#!/usr/bin/env bash
# The experiment: gpt, gpt_v2 and 54 configurations of gpt_v3, one CSV row of final losses each.
# Stop it and start it again at any time: a run whose row is there is not run again.
usage="usage: [JOBS=n] [SAVE=dir] bash sweep.sh [--tiny] [--dry-run] [--csv FILE] [-- FLAGS FOR EVERY RUN]"
here=$(cd "$(dirname "$0")" && pwd)
[ -f "$here/gpt.py" ] || here=${SLURM_SUBMIT_DIR:-$here} # sbatch runs a copy of this file
csv=$here/results/sweep.csv widths="384 768" depths="6 8 12" preset=(--data "$here/input.txt") dry_run=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --tiny) widths="96 192" depths="3 4 6" # text, batch and parameters are 1/32 of the published
                preset=(--data "$here/results/laptop.txt" --batch_size 8 --block_size 64 --max_iters 5000
                     --eval_interval 500 --eval_iters 60 --learning_rate 1e-3) ;;
        --dry-run) dry_run=yes ;;
        --csv) shift; csv=${1:-} ;;
        *) csv="" ;;
    esac
    [ -n "$csv" ] || { echo "sweep.sh: error: $usage" >&2; exit 2; }
    shift
done
shift # the --, if any

# The two widths alternate, so that the runs done so far tell how long the others will take.
runs=$(
    for gpt in gpt gpt_v2; do echo "$gpt --n_embd ${widths%% *} --n_head 6 --n_layer ${depths%% *}"; done
    for pe in randn sinpe rope; do for head in 6 8 12; do for layer in $depths; do for embd in $widths; do
        echo "gpt_v3 --pe $pe --n_embd $embd --n_head $head --n_layer $layer"
    done; done; done; done
)

# Prints the number of runs at once, the GPUs, and a line for each run to do; or one error, before any run.
plan=$(here=$here csv=$csv runs=$runs dry_run=$dry_run PYTHONPATH=$here python3 - \
    "${preset[@]}" --sample_chars 0 "$@" <<'EOF'
import contextlib, csv, gpt, importlib, io, os, shlex, sys, torch, zlib
env, flags, runs = os.environ, sys.argv[1:], os.environ["runs"].splitlines()
sys.argv[0] = "sweep.sh"  # in error messages
jobs, task, left_out = env.get("JOBS", ""), env.get("SLURM_ARRAY_TASK_ID"), ""
parsed, todo, done = {}, {}, set()
for index, run in enumerate(runs):
    experiment, *own = run.split()
    script = importlib.import_module(experiment)
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
        config = script.parse_args(own + flags)  # gpt, say, has no --pe_at
        parsed[index] = experiment, script.run_flags(config)
    left_out = error.getvalue() or left_out
if left_out:
    sys.stderr.write(f"leaving out {len(runs) - len(parsed)} runs: " * bool(parsed) + left_out)
    parsed or sys.exit(2)
crc32 = str(gpt.load_data(config)[3])
gpus = [str(i) for i in range(torch.cuda.device_count())] if config.device == "cuda" else []
if not (jobs.isdigit() and int(jobs) or jobs == ""):
    gpt.fail(f"JOBS={jobs} is not the number of runs at once")
if task and int(task) >= len(runs):
    gpt.fail(f"the runs are --array=0-{len(runs) - 1}")
if os.path.exists(env["csv"]) or not env["dry_run"]:
    gpt.append_rows(env["csv"])  # refuses what is no CSV of the scripts
    with open(env["csv"], newline="", encoding="utf-8") as file:
        done = {(row["experiment"], row["flags"], row["data_crc32"]) for row in csv.DictReader(file)}
for index, key in parsed.items():
    if (*key, crc32) in done or task not in (None, str(index)):
        continue
    done.add((*key, crc32))  # flags may make runs the same
    command = ["python3", f"{env['here']}/{key[0]}.py", *runs[index].split()[1:], *flags, "--csv", env["csv"]]
    if env.get("SAVE") and key[0] == "gpt_v3":  # a run that was cut off goes on
        os.makedirs(env["SAVE"], exist_ok=True)
        path = f"{env['SAVE']}/{zlib.crc32(repr((key, crc32)).encode()):08x}.pt"
        command += ["--resume" if os.path.exists(path) else "--save", path]
    todo[f"run {index + 1} of {len(runs)}: {runs[index]}"] = shlex.join(command)
gpus = env.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)) if gpus else ""
print(jobs or (gpus.count(",") + 1 if gpus else os.cpu_count()), gpus, sep="\n")
for place, (name, command) in enumerate(todo.items()):
    print(place, name, f"OMP_NUM_THREADS={env.get('OMP_NUM_THREADS', 1)} {command}", sep="\t")
EOF
) || exit 2
{ read -r jobs; read -r gpus; todo=$(cat); } <<< "$plan"
[ -z "$dry_run" ] || { printf %s "$todo" | cut -f 3; exit; }
[ -n "$todo" ] || { echo "nothing to do: the rows are in $csv"; exit; }
run() { # a line of the plan
    IFS=$'\t' read -r place name command <<< "$1"
    seconds=$(($(date +%s) - started)) ended=$((place < jobs ? 0 : place - jobs + 1))
    [ $ended = 0 ] || name+=" | $((seconds / 60)) minutes, $((seconds * (count - ended) / ended / 60)) to go"
    echo "$name"
    IFS=, read -r -a list <<< "$gpus"
    [ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES=${list[slot % ${#list[@]}]}
    eval "$command" > /dev/null || { echo "failed with exit status $?: $command" >&2; return 1; }
}
export -f run
export jobs gpus started=$(date +%s) count=$(wc -l <<< "$todo")
tr '\n' '\0' <<< "$todo" | xargs -0 -n 1 -P "$jobs" ${gpus:+--process-slot-var=slot} bash -c 'run "$1"' run ||
    { echo "some runs are missing; start it again to go on" >&2; exit 1; }
echo "done: the rows are in $csv"
