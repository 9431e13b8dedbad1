"""Fragment for test_models.py: sweep.sh and results/report.py."""
import csv
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import gpt
import gpt_v2
import gpt_v3

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
def zeros(*args, **kwargs): pass
class cuda:
    is_available = is_bf16_supported = staticmethod(lambda **kwargs: GPUS > 0)
    device_count = staticmethod(lambda: GPUS)
class cpu:
    get_capabilities = staticmethod(dict)
class backends:
    class mps:
        is_available = staticmethod(lambda: False)
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
    """A folder with sweep.sh, and scripts with the true flags and CSV that train nothing, without torch."""
    repo = tmp_path / "a repo"
    (repo / "results").mkdir(parents=True)
    shutil.copy(ROOT / "sweep.sh", repo)
    (repo / "torch.py").write_text(FAKE_TORCH)
    for script in (gpt, gpt_v2, gpt_v3):
        parts, name = sections(f"{script.__name__}.py"), script.__name__
        start = re.sub(r"^(import|from) torch.*\n", "", parts[""], flags=re.M) + "import torch\n"
        main = "\nif __name__ == '__main__':" + textwrap.indent(FAKE_MAIN.replace("NAME", repr(name)), "    ")
        (repo / f"{name}.py").write_text(start + parts["Flags"] + inspect.getsource(script.append_row) + main)
    return repo


def sweep_command(repo, *flags, **env):
    """Arguments of Popen for sweep.sh in a session of its own, python3 being the one that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {key: value for key, value in os.environ.items() if not re.match("SLURM_|OMP_|CUDA_|JOBS$", key)}
    env = ours | {"PATH": path, "PYTHONHASHSEED": "0"} | {key: str(value) for key, value in env.items()}
    return dict(args=["bash", repo / "sweep.sh", *flags], env=env, stdin=subprocess.DEVNULL, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def sweep(repo, *flags, status=0, cwd=None, **env):
    """Run sweep.sh to its end -> (standard output, standard error)."""
    process = subprocess.Popen(**sweep_command(repo, *flags, **env), cwd=cwd or repo)
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, out + err
    return out, err


def identities(path):
    return [tuple(row.values())[:5] for row in rows(path)]


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
    last = "run 56 of 56: gpt_v3 --pe rope --n_embd 768 --n_head 12 --n_layer 12, eta 0 minutes"
    assert out.splitlines()[-2] == last
    before = path.read_bytes()
    out, err = sweep(fake, "--csv", path, "--", "--data", "my 'file'.txt")
    assert (out, err) == (f"done 0, skipped 56, failed 0 in 0 minutes: {path}\n", "")
    assert path.read_bytes() == before


SAME = "--n_layer 6 --n_head 6".split()  # flags that make many runs the same: 1 + 1 + 6 are left


def test_a_run_is_skipped_by_all_that_tells_it_apart(fake):
    path = fake / "results/sweep.csv"
    for number, flags in enumerate(["", "--seed 2", "--dropout 0.1", "--dtype bfloat16", "--data b.txt"], 1):
        for _ in range(2):
            sweep(fake, "--", *SAME, *flags.split(), JOBS=8)
            assert len(rows(path)) == 8 * number


def test_failing_runs_leave_no_row_and_the_others_go_on(fake):
    out, _ = sweep(fake, BREAK=8, JOBS=8, status=1)
    failed = [line for line in out.splitlines() if line.startswith("failed with exit status 7: gpt_v3 --pe ")]
    assert len(failed) == 18 and "done 38, skipped 0, failed 18 in 0 minutes" in out
    assert "8" not in {row["n_layer"] for row in rows(fake / "results/sweep.csv")}
    assert "done 18, skipped 38, failed 0" in sweep(fake, JOBS=8)[0]


def test_flags_that_only_gpt_v3_has_fail_the_other_two(fake):
    out, err = sweep(fake, "--", "--pe_at", "qk", *SAME, status=1)
    assert "done 6, skipped 48, failed 2" in out and err.count("unrecognized arguments: --pe_at") == 2


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
    message = f"sweep.sh: error: JOBS={jobs} is not the number of runs at once\n"
    assert sweep(fake, JOBS=jobs, status=2) == ("", message)


def test_gpus_are_given_to_jobs_in_turn(fake):
    sweep(fake, "--", *SAME, GPUS=3, SLEEP=0.3)
    used = [line.split()[0] for line in (fake / "log").read_text().splitlines()]
    assert sorted(used[:3]) == ["0", "1", "2"] and sorted(set(used)) == ["0", "1", "2"] and len(used) == 8
    sweep(fake, "--", *SAME, "--seed", "2", GPUS=2, CUDA_VISIBLE_DEVICES="5,7")
    assert {line.split()[0] for line in (fake / "log").read_text().splitlines()[8:]} == {"5", "7"}


def test_the_number_of_threads_does_not_depend_on_jobs(fake):
    for jobs in (1, 3):
        sweep(fake, "--", *SAME, "--seed", str(jobs), JOBS=jobs)
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
    # These leave one size: gpt, gpt_v2 and three encodings.
    flags = ("--n_layer 2 --n_head 6 --n_embd 48 --batch_size 4 --block_size 16 --max_iters 5 --eval_iters 2 "
             "--device cpu").split()
    losses = []
    for jobs in (1, 2):
        path = tmp_path / f"{jobs}.csv"
        out, _ = sweep(ROOT, "--tiny", "--csv", path, "--", *flags, JOBS=jobs)
        assert "done 5, skipped 51, failed 0" in out
        losses.append({tuple(list(row.items())[:11]) for row in rows(path)})
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_sweep_is_clean_shell():
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", ROOT / "sweep.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- The report --------------------------------------------------------------------------------------------

def load_report(folder=ROOT / "results"):
    spec = importlib.util.spec_from_file_location("report", folder / "report.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def write_csv(path, runs, seeds=(1,), **fields):
    """A CSV of the sweep with made-up losses: rope is better than randn by 0.1, sinpe by 0.001."""
    better = {"None": 0, "randn": 0, "sinpe": 0.001, "rope": 0.1}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, gpt.COLUMNS, lineterminator="\n")
        writer.writeheader()
        for run, seed in itertools.product(runs, seeds):
            loss = 1.5 + 0.001 * int(run[4]) + 0.01 * seed - better[run[1]]
            writer.writerow(dict(zip(gpt.COLUMNS, run)) | dict(
                train_loss=loss - 0.5, val_loss=loss, published_train_loss=loss - 0.4, seed=seed, train_s=60,
                published_val_loss=loss + 0.1, block_size=256, params=int(run[2]) ** 2) | fields)
    return path


@pytest.fixture
def reported(tmp_path):
    """A copy of the report in a folder of its own, and a README with a block for every table of my.csv."""
    (tmp_path / "results").mkdir()
    for name in ("report.py", "seed.csv"):
        shutil.copy(ROOT / "results" / name, tmp_path / "results")
    module = load_report(tmp_path / "results")
    (tmp_path / "README.md").write_text("before\n" + "".join(
        f"<!-- report:my {name} -->\nold\n<!-- /report -->\n" for name in module.TABLES) + "after\n")
    return module


def report(module, *args, monkeypatch):
    """Run main of the report -> its exit status."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
    try:
        module.main()
    except SystemExit as exit:
        return exit.code
    return 0


def test_the_published_losses():
    published = rows(ROOT / "results/seed.csv")
    assert list(published[0]) == gpt.COLUMNS and len(published) == 45
    losses = {tuple(row.values())[:5]: (row["train_loss"], row["val_loss"]) for row in published}
    assert len(losses) == 45 and set(losses) < set(GRID_56)
    assert sum("" in pair for pair in losses.values()) == 5
    assert losses["gpt", "None", "384", "6", "6"] == ("0.853996", "1.57244")
    assert losses["gpt_v2", "None", "384", "6", "6"] == ("0.896341", "1.58272")
    assert losses["gpt_v3", "sinpe", "384", "8", "6"] == ("1.08104", "1.50614")
    assert losses["gpt_v3", "rope", "768", "8", "12"] == ("0.170163", "2.78921")
    assert losses["gpt_v3", "rope", "384", "6", "8"] == ("", "1.62199")
    assert losses["gpt_v3", "sinpe", "768", "6", "12"] == ("0.408973", "")


def test_the_readme_is_what_the_csvs_give():
    names = set(re.findall(r"<!-- report:(\S+) ", (ROOT / "README.md").read_text()))
    assert names
    for name in names:
        path = ROOT / "results" / f"{name}.csv"
        done = subprocess.run([sys.executable, "results/report.py", path, "--check"], cwd=ROOT,
                              capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("runs,missing", [
    (None, "0 of 56 runs, 56 missing: gpt 384/6/6, gpt_v2 384/6/6, gpt_v3 randn 384/6/6 and 53 more.\n"),
    (0, "0 of 56 runs, 56 missing: gpt 384/6/6, gpt_v2 384/6/6, gpt_v3 randn 384/6/6 and 53 more.\n"),
    (3, "3 of 56 runs, 53 missing: gpt_v3 randn 384/6/8, gpt_v3 randn 384/6/12, gpt_v3 randn 384/8/6 and"),
    (55, "55 of 56 runs, 1 missing: gpt_v3 rope 768/12/12; 55 with 1 seed. "),
    (56, "56 of 56 runs, 0 missing; 56 with 1 seed. ")])
def test_a_report_of_any_part_of_a_sweep(reported, runs, missing, monkeypatch, capsys):
    path = reported.README.with_name("results") / "my.csv"
    path.touch() if runs is None else write_csv(path, GRID_56[:runs])
    assert report(reported, path, monkeypatch=monkeypatch) == 0
    readme = reported.README.read_text()
    assert f"<!-- report:my summary -->\n{missing}" in readme and "\nold\n" not in readme
    assert readme.startswith("before\n") and readme.endswith("after\n")
    figures = [f"my_{name}.png" for name in reported.FIGURES] if runs else []
    assert sorted(file.name for file in path.parent.glob("*.png")) == sorted(figures)
    assert report(reported, path, "--check", monkeypatch=monkeypatch) == 0
    write_csv(path, GRID_56[:1], seeds=(5,))
    capsys.readouterr()
    assert report(reported, path, "--check", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err.startswith("report.py: error: README.md, table summary is not what ")
    assert reported.README.read_text() == readme


def test_a_figure_of_another_csv_is_found_out(reported, monkeypatch, capsys):
    path = write_csv(reported.README.with_name("results") / "my.csv", GRID_56)
    report(reported, path, monkeypatch=monkeypatch)
    figure = path.with_name("my_pe.png")
    figure.write_bytes(figure.read_bytes().replace(b"Source", b"Sauce!").replace(b"0", b"1"))
    capsys.readouterr()
    assert report(reported, path, "--check", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err.startswith(f"report.py: error: {figure} is not what ")


def test_tables_sort_by_their_loss_and_mark_the_best(tmp_path):
    module = load_report()
    runs = module.read(write_csv(tmp_path / "r.csv", GRID_56))
    val, train = module.factor_tables(runs, {}, factor="pe_type").split("<details>")[1:]
    assert "val loss by pe_type</b>, 18 complete configurations: randn lowest in 0, mean 1.5187; " in val
    assert "rope lowest in 18, mean 0.9187" in train
    assert val.count("\n|") == 20 and "| 384 | 6 | 6 | 1.5160 | 1.5150 | **1.4160** |" in val.splitlines()[4]
    assert "| n_embd | n_head | n_layer | randn | sinpe | rope |" in val


def test_a_difference_smaller_than_the_spread_is_noise(tmp_path):
    module = load_report()
    runs = module.read(write_csv(tmp_path / "r.csv", GRID_56[2:], seeds=(1, 2, 3)))
    table = module.seeds_table(runs, {})  # the standard deviation over seeds is 0.01
    assert "Of 54 differences between encodings 18 are noise" in table
    assert ("| 384 | 6 | 6 | 3 | 1.5260 ± 0.0100 | 1.5250 ± 0.0100 | 1.4260 ± 0.0100 "
            "| -0.0010 (noise) | -0.1000 | -0.0990 |\n") in table


def test_comparison_with_the_published_losses(tmp_path):
    module = load_report()
    published = module.read(module.PUBLISHED)
    runs = {run: [row | {"published_val_loss": row["val_loss"]}] for run, (row,) in published.items()}
    assert "| val loss | as published, attention dropout on in evaluation | 41 | 0.0000 | 1.000 |" in (
        module.published_table(runs, published))
    other = module.read(write_csv(tmp_path / "r.csv", GRID_56, max_iters=7))
    assert module.published_table(other, published).startswith("No run has the settings of a published one")


@pytest.mark.parametrize("pairs,rank", [
    ([(1, 1), (2, 2), (3, 9)], 1.0), ([(1, 3), (2, 2), (3, 1)], -1.0), ([(1, 2)], None),
    ([(1, 5), (2, 5)], None), ([(1, 1), (2, 2), (2, 3), (3, 2.5)], 0.6324555)])  # as scipy.stats.spearmanr
def test_spearman(pairs, rank):
    assert load_report().spearman(pairs) == (rank if rank is None else pytest.approx(rank))


@pytest.mark.parametrize("tail,message", [
    ("gpt,None,384", "line 4 is damaged"), ("gpt,None,384,6,six" + 32 * "," + "\n", "line 4 is damaged"),
    ("gpt,huh,384,6,6" + 32 * "," + "\n", "line 4 is damaged"),
    ("1\n", "line 4 is the second of gpt_v2 384/6/6 with seed 1"),
    ("2\n", "rows differ in block_size (256, 512); a report is of one setting")])
def test_a_report_refuses_what_it_cannot_read(tmp_path, tail, message, capsys):
    path = write_csv(tmp_path / "r.csv", GRID_56[:2])
    if len(tail) == 2:  # a seed
        other = write_csv(tmp_path / "o.csv", GRID_56[1:2], seeds=(int(tail),), block_size=256 * int(tail))
        tail = other.read_text().split("\n", 1)[1]
    path.write_text(path.read_text() + tail)
    with pytest.raises(SystemExit) as exit:
        load_report().read(path)
    assert (exit.value.code, capsys.readouterr().err) == (2, f"report.py: error: {path}: {message}\n")


def test_a_report_refuses_other_files(capsys):
    for name, message in (("LICENSE", "it is not a CSV of the sweep\n"), ("nowhere", "[Errno 2] ")):
        path = ROOT / name
        with pytest.raises(SystemExit) as exit:
            load_report().read(path)
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.startswith(f"report.py: error: {path}: {message}")
