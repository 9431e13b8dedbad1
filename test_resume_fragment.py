"""Tests of saving, resuming, generating and of several processes: gpt_v3.py under kill -9 and bad files."""
import contextlib
import io
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as some

import gpt_v3
from test_models import QUICK, ROOT, in_the_repository, rows, slow  # noqa: F401

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")
# 40 iterations and 7 evaluations in a third of a second, with everything that resuming has to bring back.
RUN = [*QUICK, *("--max_iters 40 --eval_interval 7 --dropout 0.3 --learning_rate 1e-2 --warmup_iters 5 "
                 "--min_lr 1e-4 --sample_chars 0").split()]


# --- A process that forks runs: torch is imported once -----------------------------------------------------

def patch(target, call, action):
    """Make the call-th call of target, say "os.replace", do the action (a word and its arguments)."""
    import resource
    module, name = target.split(".")
    module, calls = {"os": os, "gpt_v3": gpt_v3}[module], []
    original, (what, *with_) = getattr(module, name), action
    actions = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "sleep": time.sleep, "rename": os.rename,
               "mkdir": os.mkdir,
               "limit": lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
               "die at": lambda size: (signal.signal(signal.SIGXFSZ, signal.SIG_DFL), actions["limit"](size))}

    def patched(*args, **kwargs):
        calls.append(args)
        if len(calls) == call and what != "then kill":
            actions[what](*with_)
        result = original(*args, **kwargs)
        if len(calls) == call and what == "then kill":
            actions["kill"]()
        return result

    setattr(module, name, patched)


def serve():
    """Fork a run of gpt_v3.main for each job, a line of JSON; write its pid, and when it ends its status."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(os.open(job["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            for arguments in job["patches"]:
                patch(*arguments)
            sys.argv = ["gpt_v3.py", *job["flags"]]
            status = 0
            try:
                gpt_v3.main()
            except SystemExit as exit:
                status = exit.code
            except BaseException:
                import traceback
                traceback.print_exc()
                status = 1
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status or 0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


ONE = os.environ | {"OMP_NUM_THREADS": "1"}  # threads after a fork, or of processes side by side, do no good


class Forks:
    """Runs of gpt_v3.py, one at a time, started in milliseconds."""

    def __init__(self, folder):
        self.folder, self.number = folder, 0
        code = f"import {Path(__file__).stem} as tests; tests.serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=ONE)

    def start(self, *flags, patches=(), out=None):
        self.number += 1
        self.out, self.err = (self.folder / f"{self.number}.{name}" for name in ("out", "err"))
        self.out.touch()
        job = dict(flags=[*map(str, flags)], patches=patches, out=str(out or self.out), err=str(self.err))
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.pid = int(self.process.stdout.readline())
        return self

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(self.pid, number)
        return self

    def until(self, text):
        """Wait until the run has written text."""
        for _ in range(2000):
            if text in self.out.read_text(errors="replace"):
                return self
            time.sleep(0.01)
        raise AssertionError((text, self.out.read_text(), self.err.read_text()))

    def wait(self):
        """-> exit status (minus the number of the signal that killed it), standard output, standard error"""
        status = int(self.process.stdout.readline())
        return status, self.out.read_text(), self.err.read_text()

    def run(self, *flags, **more):
        return self.start(*flags, **more).wait()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.process.stdin.close()
    forks.process.wait(10)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A part of the text, read in no time."""
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text((ROOT / "input.txt").read_text()[:20000])
    return path


def load(path):
    return torch.load(path, weights_only=True)


def losses(path):
    """The rows of a CSV without times and memory."""
    last = gpt_v3.COLUMNS.index("compile_s")
    return [[row[name] for name in gpt_v3.COLUMNS[:last]] for row in rows(path)]


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a if key != "train_s")
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


class Case:
    """A run to interrupt: where it saves, and whether it ended as the one that nothing interrupted."""

    def __init__(self, forks, folder, text):
        self.forks, self.text = forks, text
        status, _, err = forks.run(*self.flags(folder / "whole"))
        assert (status, err) == (0, "")
        self.whole, self.rows = load(folder / "whole.pt"), losses(folder / "whole.csv")
        self.best = load(folder / "whole.pt.best")
        assert len(self.rows) == 1 and self.whole["step"] == 40

    def flags(self, name):
        begin = ["--resume"] if Path(f"{name}.pt").exists() else [*RUN, "--data", self.text, "--save"]
        return [*begin, f"{name}.pt", "--csv", f"{name}.csv"]

    def start(self, name, **more):
        return self.forks.start(*self.flags(name), **more)

    def check(self, name):
        assert same(load(f"{name}.pt"), self.whole) and same(load(f"{name}.pt.best"), self.best)
        assert losses(f"{name}.csv") == self.rows


@pytest.fixture(scope="module")
def case(forks, text, tmp_path_factory):
    return Case(forks, tmp_path_factory.mktemp("case"), text)


# --- Interrupted and resumed -------------------------------------------------------------------------------

@posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(case, tmp_path, number):
    chance, killed, chains = random.Random(int(number)), 0, 0
    while killed < 24:
        chains += 1
        for _ in range(60):
            life = case.start(tmp_path / str(chains))
            time.sleep(chance.uniform(0, 0.4))
            status, out, err = life.kill(number).wait()
            assert "Traceback" not in err
            if status == 0:
                break
            assert status in (-number, 128 + number)
            killed += 1
        else:
            status = life.forks.run(*case.flags(tmp_path / str(chains)))[0]
        assert status == 0
        case.check(tmp_path / str(chains))
    print(f"{killed} kills, {chains} runs")


MOMENTS = [(target, call, action) for call in (1, 2, 5) for target in ("os.fsync", "os.replace")
           for action in (["kill"], ["then kill"])]
MOMENTS += [("gpt_v3.save_checkpoint", call, ["die at", size])  # the kernel ends it inside the write
            for call in (1, 4) for size in (0, 4096, 30000)]
MOMENTS += [("gpt_v3.append_row", 2, ["kill"]), ("gpt_v3.append_row", 2, ["then kill"]),
            ("gpt_v3.result_row", 1, ["kill"])]


@posix
def test_killed_inside_a_write_and_resumed_equals_uninterrupted(case, tmp_path):
    for number, moment in enumerate(MOMENTS):
        name = tmp_path / str(number)
        status, _, err = case.start(name, patches=[moment]).wait()
        assert status in (-signal.SIGKILL, -signal.SIGXFSZ) and "Traceback" not in err, moment
        for path in tmp_path.glob(f"{number}.pt*"):
            if path.suffix != ".tmp":
                load(path)  # whole
        status, _, err = case.start(name).wait()
        assert (status, err) == (0, ""), moment
        case.check(name)
        if number % 5 == 0:  # and once more, when all is done
            assert case.start(name).wait()[0] == 0
            case.check(name)


@posix
def test_more_iterations_can_be_asked_for(case, tmp_path):
    name = tmp_path / "more"
    assert case.start(name).wait()[0] == 0
    before = losses(f"{name}.csv")
    assert case.forks.run(*case.flags(name), "--max_iters", 50)[0] == 0
    after = losses(f"{name}.csv")
    assert after[:1] == before and len(after) == 2 and load(f"{name}.pt")["step"] == 50
    status, _, err = case.forks.run(*case.flags(name), "--max_iters", 45)
    assert refused((status, "", err), f"--max_iters 45: the run in {name}.pt is at step 50 already\n")


@posix
def test_tiny_does_not_change_a_saved_run(case, tmp_path):
    name = tmp_path / "tiny"
    case.start(name, patches=[("os.replace", 5, ["kill"])]).wait()
    assert case.forks.run(*case.flags(name), "--tiny")[0] == 0
    case.check(name)


# --- Signals -----------------------------------------------------------------------------------------------

@posix
@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("save", [True, False], ids=["save", "nothing"])
def test_a_signal_ends_a_run_which_says_how_to_go_on(forks, text, tmp_path, number, status, save):
    path = tmp_path / "run.pt"
    flags = [*RUN, "--data", text, "--max_iters", 10**6, *["--save", path][:2 * save]]
    got, out, err = forks.start(*flags).until("step 7:").kill(number).wait()
    assert got == status and "final" not in out
    if save:
        assert err == f"stopped at step {load(path)['step']}: --resume {path} goes on\n"
    else:
        assert re.fullmatch(r"stopped at step \d+: nothing was saved\n", err)


@posix
@pytest.mark.parametrize("first,second", [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_at_once(forks, text, tmp_path, first, second):
    slow_step = ("gpt_v3.learning_rate", 3, ["sleep", 60])
    life = forks.start(*RUN, "--data", text, patches=[slow_step]).until("step 0:")
    time.sleep(0.3)
    started = time.monotonic()
    life.kill(first)
    time.sleep(0.2)  # for Python to see the first
    assert life.kill(second).wait()[::2] == (-second, "") and time.monotonic() < started + 10


# --- Disks that fill up or go away -------------------------------------------------------------------------

@posix
@pytest.mark.parametrize("action,reason", [
    (["limit", 30000], "File too large"), (["limit", 5000], "File too large"),
    (["rename", "{folder}", "{folder}.gone"], "No such file or directory"),
    (["mkdir", "{folder}/run.pt.tmp"], "Is a directory")], ids=["full", "quite full", "gone", "taken"])
def test_a_save_that_fails_costs_one_line(case, tmp_path, action, reason):
    folder = tmp_path / "folder"
    folder.mkdir()
    action = [part.format(folder=folder) if isinstance(part, str) else part for part in action]
    flags = [*RUN, "--data", case.text, "--save", folder / "run.pt"]
    status, out, err = case.forks.run(*flags, patches=[("gpt_v3.save_checkpoint", 3, action)])
    assert status == 0 and "final: " in out
    for line in err.splitlines():
        assert line.startswith(f"warning: --save {folder / 'run.pt'}"), line
        assert line.endswith(f"{reason}; the run goes on"), line
    assert len(err.splitlines()) == 5  # the evaluations after the second
    folder = folder if folder.exists() else Path(f"{folder}.gone")
    left = [path.name for path in folder.iterdir()]
    assert sorted(left) == ["run.pt", "run.pt.best"] + ["run.pt.tmp"] * (action[0] == "mkdir")
    assert load(folder / "run.pt")["step"] == 7  # the last good one
    if action[0] == "limit":
        status, _, err = case.forks.run("--resume", folder / "run.pt", "--csv", tmp_path / "r.csv")
        assert (status, err) == (0, "") and same(load(folder / "run.pt"), case.whole)
        assert losses(tmp_path / "r.csv") == case.rows


@posix
def test_a_row_that_finds_no_room_is_appended_by_resume(case, tmp_path):
    name = tmp_path / "run"
    gpt_v3.append_row(f"{name}.csv", {"data": "x" * 5000})
    limit = ["limit", os.path.getsize(f"{name}.csv") + 100]
    status, _, err = case.start(name, patches=[("gpt_v3.append_row", 2, limit)]).wait()
    assert status == 1 and err.count("\n") == 1 and "; the row was gpt_v3," in err
    assert case.start(name).wait()[0] == 0
    assert losses(f"{name}.csv")[1:] == case.rows


# --- Bad files ---------------------------------------------------------------------------------------------

def attempt(*flags):
    """gpt_v3.main in this process -> exit status, standard output, standard error"""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    status = 0
    with (contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err,
          pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned):
        warnings.simplefilter("always")
        patch.setattr(sys, "argv", ["gpt_v3.py", *map(str, flags)])
        try:
            gpt_v3.main()
        except SystemExit as exit:
            status = exit.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert not warned, [str(warning.message) for warning in warned]
    return status, out.getvalue(), err.getvalue()


def refused(result, message="", status=2):
    """Whether this is how an attempt has to fail: one line."""
    return result[0] == status and result[2].startswith(f"gpt_v3.py: error: {message}") \
        and result[2].count("\n") == 1 and len(result[2].splitlines()) == 1


@pytest.fixture(scope="module")
def saved(text, tmp_path_factory):
    """A small run that was saved, as bytes and as a state."""
    path = tmp_path_factory.mktemp("saved") / "run.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert attempt(*QUICK, "--data", text, "--save", path, "--n_layer", 1)[0] == 0
    return path.read_bytes(), load(path)


@pytest.fixture
def path(saved, tmp_path):
    (tmp_path / "run.pt").write_bytes(saved[0])
    return tmp_path / "run.pt"


def test_a_model_of_another_shape_names_the_flags_that_differ(path):
    for flags in (["--resume", path], ["--generate", path]):
        got = attempt(*flags, *"--n_embd 32 --pe rope --n_layer 1 --block_size 9".split())
        assert refused(got, f"{path} has a model of another shape: --n_embd 32 (saved: 16), "
                            "--block_size 9 (saved: 8), --pe rope (saved: sinpe)\n")
    assert refused(attempt("--resume", path, "--data", __file__), f"--data {__file__}: its characters are ")
    assert refused(attempt("--resume", path, "--generate", path), "argument --generate: not allowed with")


@pytest.mark.parametrize("name,message", [
    ("nowhere/run.pt", "No such file or directory"), ("taken.pt", "it or its .best is there already"),
    ("old", "it or its .best is there already"), (".", "it or its .best is there already"),
    ("taken.pt/run.pt", "Not a directory")])
def test_save_is_refused_before_it_can_fail_or_replace_a_run(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken.pt").write_text("kept")
    Path("old.best").write_text("kept")
    Path("input.txt").write_text("some text " * 500)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    got = attempt(*QUICK, "--save", name)
    assert refused(got, f"--save {name}: {message}") and got[1] == ""
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


class Evil:
    """What a pickle can hide: loading it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_foreign_and_hostile_files_are_refused_and_not_executed(saved, tmp_path):
    data, state = saved
    path, evil = tmp_path / "bad.pt", Evil(tmp_path / "executed")
    files = {"empty": b"", "text": b"words\n", "truncated": data[:len(data) // 2], "headless": data[100:],
             "pickle": pickle.dumps({"format": evil}), "flags": pickle.dumps(state["flags"])}
    things = {"number": 1, "list": [state], "module": torch.nn.Linear(1, 1), "tensor": torch.zeros(3),
              "evil": evil, "evil flags": state | {"flags": evil}, "old": state | {"format": "x"},
              "evil chars": state | {"chars": [evil]}, "path": state | {"chars": tmp_path}}
    for name, thing in things.items():
        buffer = io.BytesIO()
        torch.save(thing, buffer)
        files[name] = buffer.getvalue()
    for name, content in files.items():
        path.write_bytes(content)
        for flag in ("--generate", "--resume"):
            got = attempt(flag, path)
            assert refused(got, f"{path}: ") and got[2].endswith(("or damaged\n", "is wanted\n")), name
    for name in (tmp_path, tmp_path / "nowhere"):
        assert refused(attempt("--resume", name), f"{name}: ")
    assert sorted(tmp_path.iterdir()) == [path]


# --- Generation --------------------------------------------------------------------------------------------

def test_generate_writes_a_character_at_a_time(path, monkeypatch):
    log = []
    monkeypatch.setattr(sys, "stdout", type("", (), {"write": lambda self, text: log.append(text),
                                                     "flush": lambda self: log.append(None)})())
    config = gpt_v3.parse_args(["--generate", str(path), "--prompt", "ROMEO:", "--num_tokens", "5"])
    gpt_v3.sample(*gpt_v3.load_model(config), config, config.prompt, config.num_tokens)
    written = [entry for entry in log if entry != ""]
    assert written[0] == "ROMEO:" and written[1::2] == [None] * 6 and [*map(len, written[2::2])] == [1] * 6


def test_generate_is_deterministic_where_it_has_to_be(path):
    def text(*flags):
        status, out, err = attempt("--generate", path, "--num_tokens", 40, *flags)
        assert (status, err) == (0, "")
        return out

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)
    likeliest = text("--top_k", 1, "--seed", 1)
    assert {text("--top_k", 1, "--seed", 2), text("--temperature", 0, "--seed", 3)} == {likeliest}
    assert text("--prompt", "ROMEO:").startswith("ROMEO:") and len(text("--prompt", "")) == 1 + 40 + 1
    got = attempt("--generate", path, "--prompt", "a€")
    assert refused(got, "--prompt: the model does not know '€', only ")


@posix
def test_generate_into_a_pipe_that_closes_ends_quietly(forks, path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    life = forks.start("--generate", path, "--num_tokens", 10**6, out=tmp_path / "pipe")
    with open(tmp_path / "pipe", "rb", buffering=0) as pipe:
        assert pipe.read(20)
    assert life.wait()[::2] == (141, "")


# --- Several processes -------------------------------------------------------------------------------------

GLOO = [*RUN, *"--dropout 0 --dtype float32 --batch_size 8 --max_iters 30 --learning_rate 1e-3".split()]


def torchrun(*flags):
    """Start gpt_v3.py in two processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "gpt_v3.py",
         *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ONE)


@posix
@slow
def test_two_processes_equal_one_and_a_killed_one_ends_the_job(forks, text, tmp_path):
    def state(name):
        return load(tmp_path / f"{name}.pt")

    def flags(name):
        return [*GLOO, "--data", text, "--save", tmp_path / f"{name}.pt", "--csv", tmp_path / f"{name}.csv"]

    assert forks.run(*flags("one"))[0] == 0
    out, err = torchrun(*flags("two")).communicate(timeout=100)
    assert out.count("final: ") == 1 and "Warning" not in err and len(rows(tmp_path / "two.csv")) == 1
    for a, b in zip(state("one")["model"].values(), state("two")["model"].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)

    # The second process is killed after some evaluations; one process goes on.
    job = torchrun(*flags("killed"), "--max_iters", 10**6)
    for line in job.stdout:
        if line.startswith("step 7:"):
            break
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert job.communicate(timeout=60) and job.returncode != 0
    step = state("killed")["step"]
    assert forks.run("--resume", tmp_path / "killed.pt", "--max_iters", step + 7)[0] == 0
    assert state("killed")["step"] == step + 7


@posix
@slow
def test_a_signal_to_torchrun_saves_and_another_number_of_processes_goes_on(forks, text, tmp_path):
    path = tmp_path / "run.pt"
    job = torchrun(*GLOO, "--data", text, "--max_iters", 10**5, "--eval_interval", 1000, "--save", path)
    for line in job.stdout:
        if line.startswith("step 0:"):
            break
    time.sleep(0.3)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    step = load(path)["step"]
    assert step > 0 and job.returncode != 0
    assert f"stopped at step {step}: --resume {path} goes on\n" in err and err.count("stopped") == 1
    assert forks.run("--resume", path, "--max_iters", step + 3)[0] == 0 and load(path)["step"] == step + 3


# --- Anything at all ---------------------------------------------------------------------------------------

def fuzz(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                               suppress_health_check=list(hypothesis.HealthCheck))


ODD = "- -- --tiny inf nan 1e400 cpu cuda:-1 cuda:9 mps xla meta hpu rope qk . .. /dev/null".split()
WORDS = (some.text(some.characters(exclude_characters="\0"), max_size=8) | some.floats().map(str)
         | some.integers(-2, 2**70).map(str) | some.sampled_from(ODD))
FLAGS = """data batch_size block_size max_iters eval_interval eval_iters learning_rate n_embd n_head n_layer
    dropout pe pe_at warmup_iters min_lr weight_decay beta2 grad_clip grad_accum seed device dtype compile csv
    save resume generate prompt num_tokens temperature top_k sample_chars tiny frobnicate""".split()


@fuzz(300)
@hypothesis.given(some.lists(some.tuples(some.sampled_from(FLAGS), WORDS, some.booleans()), max_size=4))
def test_any_flags_are_taken_or_refused_in_one_line(words):
    argv = []
    for flag, word, joined in words:
        argv += [f"--{flag}={word}"] if joined else [f"--{flag}", word]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            gpt_v3.parse_args(argv)
            assert err.getvalue() == ""
        except SystemExit as exit:
            assert exit.code == 2 and len(err.getvalue().splitlines()) == 1


SIZES = some.dictionaries(some.sampled_from(FLAGS[1:6] + FLAGS[7:10]), some.integers(1, 9), max_size=3)
RATES = some.dictionaries(some.sampled_from([FLAGS[i] for i in (6, 10, 14, 15, 16, 17)]),
                          some.floats(0, 1e308), max_size=2)


@fuzz(40)
@hypothesis.given(sizes=SIZES, rates=RATES, pe=some.sampled_from(["sinpe", "rope", "randn"]),
                  pe_at=some.sampled_from(["input", "qk"]))
def test_any_small_run_ends_well_or_in_one_line(text, sizes, rates, **encoding):
    flags = [f"--{name}={value}" for name, value in (sizes | rates | encoding).items()]
    got = attempt(*QUICK, "--data", text, *flags)
    assert got[0] == 0 or refused(got) or refused(got, "the loss is not finite", status=1), got


def damage(data, edits):
    """data with edits: (where, a number from 0 to 1; what; with which bytes)."""
    for where, what, new in edits:
        at = int(where * len(data))
        data = data[:at] + {"flip": bytes(255 - byte for byte in data[at:at + 1]) + data[at + 1:], "cut": b"",
                            "drop": data[at + len(new):], "insert": new + data[at:],
                            "overwrite": new + data[at + len(new):]}[what]
    return data


KINDS = some.sampled_from(["flip", "cut", "drop", "insert", "overwrite"])
EDITS = some.lists(some.tuples(some.floats(0, 1), KINDS, some.binary(max_size=12)), min_size=1, max_size=3)
# The end of the file, its table of contents, is where damage is most interesting.
EDITS |= some.lists(some.tuples(some.floats(0.9, 1), KINDS, some.binary(max_size=4)), min_size=1, max_size=2)


@fuzz(400)
@hypothesis.given(edits=EDITS)
def test_any_damage_to_a_saved_run_is_harmless_or_refused_in_one_line(saved, tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(damage(saved[0], edits))
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            assert same(gpt_v3.load_checkpoint(path), saved[1])  # the damage hit padding
        except SystemExit as exit:
            assert exit.code == 2
            assert err.getvalue().endswith("damaged\n") or err.getvalue().endswith("is wanted\n")
            assert len(err.getvalue().splitlines()) == 1


THINGS = some.sampled_from([
    None, -1, 0, 1, 2**70, 10**400, 1.5, math.nan, math.inf, -math.inf, "", "x", "\n", b"x", [],
    ["ab"], {}, {"x": 1}, {0: {}}, (), True, torch.zeros(()), torch.zeros(3), torch.full((65, 16), math.nan),
    *(torch.zeros(size, dtype=torch.uint8) for size in (0, 16, 5056)), torch.zeros(16, dtype=torch.long)])


@fuzz(250)
@hypothesis.given(thing=THINGS, data=some.data())
def test_any_thing_in_a_saved_run_is_taken_or_refused_in_one_line(saved, tmp_path_factory, thing, data):
    path = tmp_path_factory.getbasetemp() / "hostile.pt"

    def replace(part, depth=0):
        """part with one of its values, or of the values in that, replaced, or with one more."""
        key = data.draw(some.sampled_from([*part, "new"] if depth else [*part]))
        inner = part.get(key)
        deeper = isinstance(inner, dict) and inner and data.draw(some.booleans())
        return part | {key: replace(inner, depth + 1) if deeper else thing}

    state = replace(dict(saved[1]))
    torch.save(state, path)
    for flags in ("--num_tokens 2 --generate", "--max_iters 5 --sample_chars 0 --resume"):
        got = attempt(*"--device cpu".split(), *flags.split(), path)
        assert got[0] == 0 or refused(got) or refused(got, "the loss is not finite", status=1), (state, got)


@fuzz(150)
@hypothesis.given(edits=EDITS)
def test_any_damage_to_a_csv_is_refused_in_one_line_or_kept(tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "damaged.csv"
    row = {"experiment": "gpt_v3", "val_loss": 1.5, "data": 'a "quoted", é name'}
    path.unlink(missing_ok=True)
    gpt_v3.append_row(str(path), row)
    before = damage(path.read_bytes(), edits)
    path.write_bytes(before)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            gpt_v3.append_row(str(path))
            if not gpt_v3.has_row(path, row):
                gpt_v3.append_row(str(path), row)
            assert path.read_bytes().startswith(before) and gpt_v3.has_row(path, row)
        except SystemExit as exit:
            assert exit.code == 2 and len(err.getvalue().splitlines()) == 1 and path.read_bytes() == before
