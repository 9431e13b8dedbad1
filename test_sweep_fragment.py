"""Fragment for test_models.py: sweep.sh and results/report.py."""
import csv
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gpt

ROOT = Path(__file__).parent
slow = pytest.mark.slow


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def sections(name):
    parts = re.split(r"^# --- (\w+) -+\n", (ROOT / name).read_text(), flags=re.M)
    return dict(zip(["", *parts[1::2]], parts[::2]))


# ---- from here on for test_models.py ----

# --- The sweep ---------------------------------------------------------------------------------------------

GRID_56 = [("gpt", "None", "384", "6", "6"), ("gpt_v2", "None", "384", "6", "6"), *itertools.product(
    ["gpt_v3"], ["randn", "sinpe", "rope"], ["384", "768"], ["6", "8", "12"], ["6", "8", "12"])]

FAKE_TORCH = """
import os
__version__ = "fake"
GPUS = int(os.environ.get("GPUS", 0))
class device:
    def __init__(self, name): self.type, self.name = str(name).split(":")[0], str(name)
    def __str__(self): return self.name
class zeros:
    def __init__(self, *args, **kwargs): pass
    def item(self): pass
class cuda:
    is_available = is_bf16_supported = staticmethod(lambda: GPUS > 0)
    device_count = staticmethod(lambda: GPUS)
class cpu:
    _is_avx512_bf16_supported = staticmethod(lambda: False)
class backends:
    mps = cuda = type("no", (), {"is_available": staticmethod(lambda: False)})
"""
FAKE_MAIN = """
config = parse_args()
append_row(config.csv)
with open("log", "a") as log:
    log.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ['OMP_NUM_THREADS']}\\n")
time.sleep(float(os.environ.get("SLEEP", 0)))
if config.n_layer == int(os.environ.get("BREAK", 0)):
    sys.exit(7)
append_row(config.csv, vars(config) | dict(experiment=NAME, pe_type=getattr(config, "pe", "None"),
                                           train_loss=hash(str(config)) % 1000))
"""


@pytest.fixture
def fake(tmp_path):
    """A folder with sweep.sh and scripts that have the true flags and CSV, but train nothing and import no torch."""
    repo = tmp_path / "a repo"
    (repo / "results").mkdir(parents=True)
    shutil.copy(ROOT / "sweep.sh", repo)
    (repo / "torch.py").write_text(FAKE_TORCH)
    for name in ("gpt", "gpt_v2", "gpt_v3"):
        parts = sections(f"{name}.py")
        start = re.sub(r"^(import|from) torch.*\n", "", parts[""], flags=re.M) + "import torch\n"
        main = "\nif __name__ == '__main__':\n" + FAKE_MAIN.replace("NAME", repr(name)).replace("\n", "\n    ")
        (repo / f"{name}.py").write_text(start + parts["Flags"] + parts["Results"] + main)
    return repo


def sweep_command(repo, *flags, bash="bash", **env):
    """Arguments of Popen for sweep.sh in a process group of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONHASHSEED": "0", **{key: str(value) for key, value in env.items()}}
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_ARRAY_TASK_ID", "SLURM_SUBMIT_DIR", "JOBS"):
        if name in os.environ:
            env.pop(name)
    return dict(args=[bash, repo / "sweep.sh", *flags], env=env, stdin=subprocess.DEVNULL, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def sweep(repo, *flags, status=0, cwd=None, **env):
    """Run sweep.sh to its end -> (standard output, standard error)."""
    process = subprocess.Popen(**sweep_command(repo, *flags, **env), cwd=cwd or repo)
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, out + err
    return out, err


def identities(path):
    return [(row["experiment"], row["pe_type"], row["n_embd"], row["n_head"], row["n_layer"]) for row in rows(path)]


def test_sweep_has_the_56_runs_of_the_experiment():
    lines = sweep(ROOT, "--dry-run")[0].splitlines()
    configs = []
    for line in lines:
        command = shlex.split(line)[4:]  # cd FOLDER && OMP_NUM_THREADS=1
        assert command[0] == "python3" and not (ROOT / "results/sweep.csv.lock").exists()
        flags = dict(zip(command[2::2], command[3::2]))
        configs.append((command[1][:-3], flags.get("--pe", "None"), flags["--n_embd"], flags["--n_head"],
                        flags["--n_layer"]))
    assert len(lines) == len(set(lines)) == 56 and sorted(configs) == sorted(GRID_56)
    assert len(set(sweep(ROOT, "--tiny", "--dry-run")[0].splitlines())) == 56


def test_sweep_depth_varies_fastest():
    depths = re.findall(r"gpt_v3.* --n_layer (\d+)", sweep(ROOT, "--dry-run")[0])
    assert depths == ["6", "8", "12"] * 18


def test_a_sweep_runs_once_and_is_skipped_after(fake, tmp_path):
    out, err = sweep(fake, "--csv", "r.csv", "--", "--data", "my 'file'.txt", cwd=tmp_path)
    path = tmp_path / "r.csv"
    assert sorted(identities(path)) == sorted(GRID_56) and err == ""
    assert {row["data"] for row in rows(path)} == {"my 'file'.txt"}
    assert out.splitlines()[-1] == f"done 56, skipped 0, failed 0 in 0 minutes: {path}"
    assert re.fullmatch(r"run 56 of 56: gpt_v3 --pe rope --n_embd 768 --n_head 12 --n_layer 12, eta 0 minutes",
                        out.splitlines()[-2])
    before = path.read_bytes()
    out, err = sweep(fake, "--csv", path, "--", "--data", "my 'file'.txt")
    assert (out, err) == (f"done 0, skipped 56, failed 0 in 0 minutes: {path}\n", "")
    assert path.read_bytes() == before


def test_a_run_is_skipped_by_all_that_tells_it_apart(fake):
    path = fake / "results/sweep.csv"
    for number, flags in enumerate(["--n_layer 6", "--n_layer 6 --seed 2", "--n_layer 6 --dropout 0.1",
                                    "--n_layer 6 --dtype bfloat16"], 1):
        for _ in range(2):  # 1 + 1 + 18 runs are left when all have the same depth
            sweep(fake, "--", *flags.split())
            assert len(rows(path)) == 20 * number
    with path.open("a") as file:  # a run of last year, with the same size
        file.write(path.read_text().splitlines()[1].replace("input.txt", "other.txt") + "\n")
    assert "skipped 56," in sweep(fake, "--", "--n_layer", "6")[0]


def test_failing_runs_leave_no_row_and_the_others_go_on(fake):
    out, _ = sweep(fake, BREAK=8, status=1)
    failed = [line for line in out.splitlines() if line.startswith("failed with exit status 7: gpt_v3 --pe ")]
    assert len(failed) == 18 and "done 38, skipped 0, failed 18 in 0 minutes" in out
    assert "8" not in {row["n_layer"] for row in rows(fake / "results/sweep.csv")}
    assert "done 18, skipped 38, failed 0" in sweep(fake)[0]


def test_flags_that_only_gpt_v3_has_fail_the_other_two(fake):
    out, err = sweep(fake, "--", "--pe_at", "qk", "--n_layer", "6", status=1)
    assert "done 18, skipped 36, failed 2" in out and err.count("unrecognized arguments: --pe_at") == 2


@pytest.mark.parametrize("flags,message", [
    (["--frobnicate"], "usage: "), (["--csv"], "usage: "), (["extra"], "usage: "),
    (["--", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["--", "--n_embd", "100"], "--n_embd 100 is not a multiple of --n_head 6"),
    (["--csv", "nowhere/r.csv"], "nowhere/r.csv: its folder is not there or cannot be written to"),
    (["--csv", "foreign.csv"], "foreign.csv: it is not a whole CSV of these scripts"),
    (["--csv", "torn.csv"], "torn.csv: it is not a whole CSV of these scripts"),
    (["--csv", "short.csv"], "short.csv: it has a row with too many or too few cells"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_ends_a_sweep_before_it_starts(fake, flags, message):
    header = ",".join(gpt.COLUMNS)
    (fake / "foreign.csv").write_text("a,b\n1,2\n")
    (fake / "torn.csv").write_text(header + "\ngpt,None,3")
    (fake / "short.csv").write_text(header + "\ngpt,None,3\n")
    out, err = sweep(fake, *flags, status=2)
    assert out == "" and err.startswith("sweep.sh: error: ") and message in err and err.count("\n") == 1
    assert not (fake / "log").exists()


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5"])
def test_jobs_is_a_number(fake, jobs):
    assert sweep(fake, JOBS=jobs, status=2)[1] == f"sweep.sh: error: JOBS={jobs} is not the number of runs at once\n"


def test_gpus_are_given_to_jobs_in_turn(fake):
    sweep(fake, GPUS=3, SLEEP=0.05)
    used = [line.split()[0] for line in (fake / "log").read_text().splitlines()]
    assert sorted(set(used)) == ["0", "1", "2"] and min(map(used.count, "012")) > 9
    sweep(fake, "--", "--seed", "2", GPUS=2, CUDA_VISIBLE_DEVICES="5,7")
    assert {line.split()[0] for line in (fake / "log").read_text().splitlines()[56:]} == {"5", "7"}


def test_the_number_of_threads_does_not_depend_on_jobs(fake):
    for jobs in (1, 3):
        sweep(fake, "--", "--seed", jobs, JOBS=jobs) if False else sweep(fake, "--", "--seed", str(jobs), JOBS=jobs)
    assert set((fake / "log").read_text().splitlines()) == {"None 1"}


def test_a_slurm_array_runs_one_line_a_task(fake, tmp_path):
    spooled = tmp_path / "spool"  # sbatch runs a copy from elsewhere
    spooled.mkdir()
    shutil.copy(fake / "sweep.sh", spooled)
    tasks = [subprocess.Popen(**sweep_command(spooled, SLURM_ARRAY_TASK_ID=i, SLURM_SUBMIT_DIR=fake))
             for i in (0, 1, 2, 55, 55 - 9)]
    outs = [task.communicate(timeout=60)[0] for task in tasks]
    path = fake / "results/sweep.csv"
    lines = sweep(fake, "--dry-run")[0].splitlines()
    assert len(rows(path)) == 5 and all("done 1, skipped 0, failed 0" in out for out in outs)
    assert set(identities(path)) >= {GRID_56[0], GRID_56[1], GRID_56[2], GRID_56[55]} and len(lines) == 56
    assert "skipped 1," in sweep(spooled, SLURM_ARRAY_TASK_ID=55, SLURM_SUBMIT_DIR=fake)[0]
    assert sweep(fake, SLURM_ARRAY_TASK_ID=56, status=2)[1] == "sweep.sh: error: the runs are --array=0-55\n"


def test_a_sweep_killed_at_any_moment_goes_on_where_it_was(fake):
    """kill -9 of sweep.sh alone: its runs live on, and the next sweep waits for them."""
    path = fake / "results/sweep.csv"
    for delay in (0.05, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8):
        process = subprocess.Popen(**sweep_command(fake, JOBS=3, SLEEP=0.1))
        time.sleep(delay)
        process.kill()
        process.communicate()  # its runs hold the pipes, too: this waits for them
    process = subprocess.Popen(**sweep_command(fake, JOBS=3, SLEEP=1) | dict(stdout=subprocess.DEVNULL,
                                                                             stderr=subprocess.DEVNULL))
    time.sleep(1)
    process.kill()
    process.wait()
    _, err = sweep(fake, JOBS=3)
    assert err == f"sweep.sh: waiting for the runs of another sweep into {path} to end\n"
    assert sorted(identities(path)) == sorted(GRID_56) and path.read_bytes().count(b"\n") == 57


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_a_sweep_with_all_its_runs(fake, number, status):
    process = subprocess.Popen(**sweep_command(fake, JOBS=2, SLEEP=30))
    while not (fake / "log").exists() or (fake / "log").read_text().count("\n") < 2:
        time.sleep(0.05)
    process.send_signal(number)
    started = time.monotonic()
    out, err = process.communicate(timeout=10)  # the pipes close when the runs have ended
    assert process.returncode == status and time.monotonic() - started < 5
    assert err == "sweep.sh: stopped; start it again to go on\n"
    assert not (fake / "results/sweep.csv").exists()


@slow
def test_two_jobs_give_the_losses_of_one(tmp_path):
    flags = "--n_layer 2 --n_head 6 --n_embd 48 --batch_size 4 --block_size 16 --max_iters 5 --eval_iters 2".split()
    losses = []
    for jobs in (1, 2):
        path = tmp_path / f"{jobs}.csv"
        out, _ = sweep(ROOT, "--tiny", "--csv", path, "--", *flags, "--device", "cpu", JOBS=jobs)
        assert "done 5, skipped 51, failed 0" in out  # the flags leave one size: gpt, gpt_v2 and three encodings
        losses.append({tuple(list(row.items())[:11]) for row in rows(path)})
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_sweep_is_clean_shell():
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", ROOT / "sweep.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
