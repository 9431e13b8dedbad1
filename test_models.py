"""Tests of the scripts, the sweep, the report and the benchmark.

    python -m pytest                  all of them, a few minutes on two cores
    python -m pytest -m "not slow"    the quick ones
"""
import contextlib
import csv
import difflib
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import strategies as some
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import gpt
import gpt_v2
import gpt_v3

ROOT = Path(__file__).parent
SCRIPTS = [gpt, gpt_v2, gpt_v3]
ENCODINGS = [(pe, pe_at) for pe in ("randn", "sinpe", "rope") for pe_at in ("input", "qk")]
# A run of a second: the smallest model on the real text.
QUICK = ("--batch_size 4 --block_size 8 --n_embd 16 --n_head 2 --n_layer 2 --max_iters 4 --eval_interval 2 "
         "--eval_iters 2 --sample_chars 20 --device cpu").split()

warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # there is no pytest.ini to declare it in
slow = pytest.mark.slow  # more than a few seconds
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """input.txt is found, whatever folder pytest is started from."""
    monkeypatch.chdir(ROOT)


def make(script, seed=0, **fields):
    """A small model of a script in float64, its weights large enough for attention to matter."""
    config = SimpleNamespace(**dict(vocab_size=11, block_size=12, n_embd=24, n_head=3, n_layer=2, dropout=0.0,
                                    pe="sinpe", pe_at="input") | fields)
    torch.manual_seed(seed)
    model = script.GPT(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


def run(*args, cwd=ROOT, status=0, **kwargs):
    """Run a script as a user would -> (standard output, standard error)."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          timeout=300, **kwargs)
    assert done.returncode == status, done.stderr + done.stdout
    return done.stdout, done.stderr


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- The files ---------------------------------------------------------------------------------------------

def test_input_is_the_known_tiny_shakespeare():
    digest = hashlib.sha256((ROOT / "input.txt").read_bytes()).hexdigest()
    assert digest == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def sections(name):
    """{title: text} of a script, cut at its rulers; "" is what comes before the first."""
    parts = re.split(r"^# --- (\w+) -+\n", (ROOT / name).read_text(), flags=re.M)
    return dict(zip(["", *parts[1::2]], parts[::2]))


def test_scripts_have_the_same_sections_in_the_same_order():
    shared = [title for title in sections("gpt_v3.py") if title != "Checkpoints"]
    assert list(sections("gpt.py")) == list(sections("gpt_v2.py")) == shared


def test_gpt_and_gpt_v2_differ_only_in_docstring_and_model():
    one, two = sections("gpt.py"), sections("gpt_v2.py")
    one[""], two[""] = one[""].split('"""')[2], two[""].split('"""')[2]
    assert [title for title in one if one[title] != two[title]] == ["Model"]


def test_the_diff_is_the_lesson():
    lines = difflib.ndiff(*((ROOT / name).read_text().splitlines() for name in ("gpt.py", "gpt_v2.py")))
    assert sum(line[0] in "+-" for line in lines) <= 20


@pytest.mark.parametrize("name", "fail number load_data get_batch Dropout autocast estimate_loss time_left "
                                 "report result_row append_row out_of_memory compile_blocks warm_up "
                                 "COLUMNS".split())
def test_shared_parts_are_identical(name):
    if name == "COLUMNS":
        assert gpt.COLUMNS == gpt_v2.COLUMNS == gpt_v3.COLUMNS
    else:
        assert len({inspect.getsource(getattr(script, name)) for script in SCRIPTS}) == 1


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("results/*.py")], ids=lambda path: path.name)
def test_lines_fit_a_projector(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 110] == []


def test_import_has_no_side_effects(tmp_path):
    code = "import torch; s = torch.get_rng_state(); import gpt, gpt_v2, gpt_v3; " \
           "assert torch.equal(s, torch.get_rng_state())"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    out, err = run("-c", code, cwd=tmp_path, env=env)
    assert (out, err, list(tmp_path.iterdir())) == ("", "", [])


# --- The models --------------------------------------------------------------------------------------------

def test_gpt_and_gpt_v2_are_the_same_function():
    one, two = make(gpt), make(gpt_v2, seed=1)
    two.load_state_dict(one.state_dict())
    one.load_state_dict(two.state_dict())
    x, y = tokens(3, 12), tokens(3, 12).flip(0)
    for model in (one, two):
        model(x, y)[1].backward()
    torch.testing.assert_close(one(x)[0], two(x)[0])
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("pe,pe_at", ENCODINGS)
def test_gpt_v3_attention_is_the_one_written_out(pe, pe_at):
    attention = make(gpt_v3, pe=pe, pe_at=pe_at).blocks[0].attn
    x = torch.randn(2, 12, 24, dtype=torch.double)
    out = torch.empty_like(x)
    for b in range(2):
        q, k, v = (x[b] @ attention.c_attn.weight.T + attention.c_attn.bias).split(24, dim=-1)
        for h in range(3):
            part = slice(8 * h, 8 * h + 8)
            qh, kh, vh = attention.pe(q[:, part]), attention.pe(k[:, part]), v[:, part]
            for t in range(12):
                weights = torch.softmax(kh[:t + 1] @ qh[t] / math.sqrt(8), dim=0)
                out[b, t, part] = weights @ vh[:t + 1]
    torch.testing.assert_close(attention(x), out @ attention.c_proj.weight.T + attention.c_proj.bias)


def test_positional_encodings_are_their_formulas():
    x = torch.randn(2, 5, 6)
    sin, rope, randn = (gpt_v3.PositionalEncoding(pe, 9, 6)(x) for pe in ("sinpe", "rope", "randn"))
    for t in range(5):
        for i in range(3):
            angle = t * 10000 ** (-2 * i / 6)
            pair = x[:, t, 2 * i:2 * i + 2]
            wave = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(sin[:, t, 2 * i:2 * i + 2], pair + wave)
            turned = torch.view_as_complex(pair.contiguous()) * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(rope[:, t, 2 * i:2 * i + 2], torch.view_as_real(turned))
    torch.testing.assert_close((randn - x)[0], (randn - x)[1])  # the same for every sequence
    noise = gpt_v3.PositionalEncoding("randn", 1000, 64).table
    assert abs(noise.std() - 0.02) < 2e-4 and abs(noise.mean()) < 5e-4


def test_randn_is_saved_and_never_trained():
    model = make(gpt_v3, pe="randn")
    assert "pe.table" in model.state_dict() and "pe.table" not in dict(model.named_parameters())
    assert not [key for pe in ("sinpe", "rope") for key in make(gpt_v3, pe=pe).state_dict() if "table" in key]


def test_rope_scores_depend_on_distance_alone():
    rope = gpt_v3.PositionalEncoding("rope", 64, 16).double()
    q, k = torch.randn(2, 16, dtype=torch.double)
    turned_q, turned_k = rope(q.expand(64, 16)), rope(k.expand(64, 16))
    scores = turned_q @ turned_k.T
    for distance in (-5, 0, 7):
        diagonal = scores.diagonal(distance)
        same = diagonal[:1].expand_as(diagonal)
        torch.testing.assert_close(diagonal, same, rtol=1e-4, atol=1e-5)  # the table is in float32
    assert not torch.allclose(scores.diagonal(1)[0], scores.diagonal(2)[0])


@pytest.mark.parametrize("script,pe,pe_at", [(gpt, "", ""), (gpt_v2, "", ""),
                                              *((gpt_v3, *encoding) for encoding in ENCODINGS)],
                         ids=lambda value: getattr(value, "__name__", value))
def test_no_token_sees_a_later_one(script, pe, pe_at):
    model = make(script, pe=pe, pe_at=pe_at)
    x = tokens(1, 12)
    before = model(x)[0]
    for t in range(1, 12):
        other = x.clone()
        other[0, t] = (x[0, t] + 1) % 11
        after = model(other)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [1e-4, 0.2, 0.5, 0.999])
def test_dropout_drops_its_share_and_scales_the_rest(p, dtype):
    n = 1_000_003  # four masks come from one draw: not a multiple of four
    torch.manual_seed(0)
    x = torch.ones(n, dtype=dtype, requires_grad=True)
    y = gpt.Dropout(p)(x)
    y.sum().backward()
    assert y.dtype == dtype and torch.equal(x.grad, y)  # what was dropped learns nothing
    kept = y != 0
    assert torch.all(y[kept] == torch.tensor(1.0, dtype=dtype) / (1 - p))
    dropped = (~kept).double()
    assert abs(dropped.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    for lag in (1, 2, 3, 4):  # neighbours, of one draw or of two, know nothing of each other
        correlation = torch.corrcoef(torch.stack((dropped[lag:], dropped[:-lag])))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n)


def test_dropout_is_nothing_in_evaluation_or_at_0():
    x, state = torch.randn(3, 5), torch.get_rng_state()
    assert torch.equal(gpt.Dropout(0.5).eval()(x), x) and torch.equal(gpt.Dropout(0.0)(x), x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_all_matrix_products_are_in_bfloat16(script):
    """Those inside SDPA, too, which has no fused kernel for dropout on a CPU."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                seen.append((function.overloadpacket, args[-1].dtype))
            return function(*args, **kwargs or {})

    config = script.parse_args([*QUICK, "--dropout", "0.2", "--dtype", "bfloat16"])
    config.vocab_size = 11
    model = script.GPT(config)
    with Watch(), script.autocast(config):
        model(tokens(4, 8), tokens(4, 8))
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    assert any(function == torch.ops.aten.bmm for function, _ in seen)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_initial_weights_and_loss(script):
    config = SimpleNamespace(vocab_size=65, block_size=64, n_embd=128, n_head=4, n_layer=2, dropout=0.0,
                             pe="rope", pe_at="qk")
    model = script.GPT(config)
    for name, p in model.named_parameters():
        if "bias" in name:
            assert torch.all(p == 0), name
        elif "ln" not in name:
            assert abs(p.std() - 0.02) < 2e-3 and abs(p.mean()) < 2e-3, name
    x = torch.randint(65, (4, 64))
    assert abs(model(x, x.flip(0))[1].item() - math.log(65)) < 0.1
    assert (model.lm_head.bias is None) == (script is gpt_v3)


GRID = [(pe, pe_at, n_embd, n_head, n_layer) for pe, pe_at in ENCODINGS
        for n_embd in (384, 768) for n_head in (6, 8, 12) for n_layer in (6, 8, 12)]


@pytest.mark.parametrize("pe,pe_at,n_embd,n_head,n_layer", GRID)
def test_the_whole_grid_builds_and_trains(pe, pe_at, n_embd, n_head, n_layer):
    """Shapes alone, on the meta device: 85M parameters cost nothing there."""
    with torch.device("meta"):
        model = gpt_v3.GPT(SimpleNamespace(vocab_size=65, block_size=256, n_embd=n_embd, n_head=n_head,
                                           n_layer=n_layer, dropout=0.2, pe=pe, pe_at=pe_at))
        x = torch.zeros(2, 256, dtype=torch.long)
        logits, loss = model(x, x)
        loss.backward()
    assert logits.shape == (2, 256, 65) and all(p.grad is not None for p in model.parameters())
    width = n_embd
    block = 2 * 2 * width + 3 * width * (width + 1) + width * (width + 1) + width * 4 * width * 2 + 5 * width
    assert sum(p.numel() for p in model.parameters()) == n_layer * block + 2 * width + 2 * 65 * width


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_one_batch_can_be_learnt_by_heart(script):
    model = make(script, pe="rope", pe_at="qk").float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    x, y = tokens(4, 12), tokens(5, 12)[1:]
    for _ in range(300):
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


@pytest.mark.parametrize("script", [gpt, gpt_v2], ids=lambda s: s.__name__)
def test_generate_keeps_the_prompt_and_crops_the_context(script):
    model = make(script).eval()
    prompt = tokens(2, 3)
    out = model.generate(prompt, 20)  # longer than block_size
    assert out.shape == (2, 23) and torch.equal(out[:, :3], prompt)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_evaluation_repeats_itself_and_leaves_training_alone(script):
    config = script.parse_args([*QUICK, "--dropout", "0.5"])
    config.vocab_size = 11
    torch.manual_seed(0)
    model = script.GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    splits = {"train": tokens(500), "val": tokens(100)}
    state = torch.get_rng_state()
    first = script.estimate_loss(model, splits, config)
    assert script.estimate_loss(model, splits, config) == first
    assert torch.equal(torch.get_rng_state(), state) and model.training
    # the published runs: SDPA's dropout stayed on, nn.Dropout did not
    published = script.estimate_loss(model, splits, config, attention_dropout=True)
    assert (published == first) == (script is gpt)
    assert script.estimate_loss(model, splits, config) == first


def test_evaluation_memory_does_not_grow_with_eval_iters():
    config = gpt_v3.parse_args([*QUICK, "--n_embd", "32"])
    config.vocab_size = 11
    model, splits = gpt_v3.GPT(config), {"train": tokens(500)}

    def live_tensors_in_the_last_of(iters):
        calls, live = [], []

        def count(*_):
            calls.append(None)
            if len(calls) == iters:
                live.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

        config.eval_iters = iters
        handle = model.register_forward_hook(count)
        gpt_v3.estimate_loss(model, splits, config)
        handle.remove()
        return live[0]

    assert live_tensors_in_the_last_of(40) <= live_tensors_in_the_last_of(5)


@pytest.mark.parametrize("step,rate", [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.55), (100, 0.1)])
def test_learning_rate_warms_up_and_decays(step, rate):
    config = SimpleNamespace(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100)
    assert gpt_v3.learning_rate(step, config) == pytest.approx(rate)
    config.min_lr = None
    assert gpt_v3.learning_rate(step, config) == (1.0 if step >= 10 else pytest.approx(rate))


def test_batches_are_windows_of_the_text():
    config = SimpleNamespace(batch_size=64, block_size=4, device=torch.device("cpu"))
    data = torch.arange(7)
    x, y = gpt.get_batch(data, config, torch.Generator().manual_seed(0))
    assert torch.equal(x + 1, y) and torch.equal(x - x[:, :1], torch.arange(4).expand(64, 4))
    assert set(x[:, 0].tolist()) == {0, 1, 2}  # every window that fits, the last one included


# --- Runs --------------------------------------------------------------------------------------------------

STEP = re.compile(r"step \d+: train loss \d\.\d{4}, val loss \d\.\d{4} \| "
                  r"(\d+\.\d\d ms/iter, \d+\.\d\dM tok/s, )?eta \d+:\d\d")


@pytest.mark.parametrize("script", ["gpt.py", "gpt_v2.py", "gpt_v3.py"])
def test_a_script_copied_alone_runs(script, tmp_path):
    shutil.copy(ROOT / script, tmp_path)
    shutil.copy(ROOT / "input.txt", tmp_path)
    out, err = run(script, *QUICK, "--csv", "runs.csv", cwd=tmp_path)
    lines = out.splitlines()
    assert err == "" and [bool(STEP.fullmatch(line)) for line in lines[2:5]] == [True] * 3
    assert re.match(r"final: train loss \d.\d{4}, val loss \d.\d{4} \(best \d.\d{4} at step \d\)", lines[5])
    assert len(out.split(lines[5])[1]) == 1 + 21 + 1  # 20 characters, after the one it starts from
    (row,) = rows(tmp_path / "runs.csv")
    assert row["experiment"] == script[:-3]
    assert row["pe_type"] == ("sinpe" if script == "gpt_v3.py" else "None")
    assert f"{float(row['val_loss']):.4f}" in lines[5] and (row["n_embd"], row["max_iters"]) == ("16", "4")
    assert row["best_val_loss"] == min(row["best_val_loss"], row["val_loss"], key=float)


def test_a_cell_of_a_notebook_runs_with_the_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "/run/kernel-1.json"])
    assert vars(gpt.parse_args()) == vars(gpt.parse_args([]))


def test_line_ends_of_windows_change_no_token(tmp_path):
    read = []
    for end in (b"\n", b"\r\n"):
        (tmp_path / "text").write_bytes(b"To be," + end + b"or not" + end)
        read.append(gpt.load_data(gpt.parse_args(["--data", str(tmp_path / "text"), "--block_size", "1"])))
    assert read[0][1] == read[1][1] and torch.equal(read[0][0]["train"], read[1][0]["train"])


def test_auto_can_be_given():
    assert vars(gpt.parse_args(["--device", "auto", "--dtype", "auto"])) == vars(gpt.parse_args([]))


def test_tiny_is_a_preset_that_other_flags_win_over():
    args = gpt_v3.parse_args(["--n_layer", "3", "--tiny"])
    assert (args.n_layer, args.n_embd) == (3, gpt_v3.TINY["n_embd"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_defaults_are_the_seed_configuration(script):
    args = vars(script.parse_args([]))
    seed = dict(batch_size=64, block_size=256, max_iters=5000, eval_interval=500, eval_iters=200, n_embd=384,
                learning_rate=3e-4, n_head=6, n_layer=6, dropout=0.2, seed=1337, data="input.txt",
                sample_chars=500)
    assert {name: args[name] for name in seed} == seed


@pytest.mark.parametrize("pe,pe_at", ENCODINGS)
def test_gpt_v3_trains_with_every_encoding(pe, pe_at, capsys):
    config = gpt_v3.parse_args([*QUICK, *"--n_embd 384 --n_head 12 --n_layer 6 --learning_rate 1e-3".split(),
                                *f"--max_iters 12 --eval_interval 12 --pe {pe} --pe_at {pe_at}".split()])
    model, chars = gpt_v3.train(config)
    final = re.search(r"final: train loss (.*), val", capsys.readouterr().out)
    gpt_v3.sample(model, chars, config, "\n", 20)
    assert float(final[1]) < 4.0 and len(capsys.readouterr().out) == 1 + 20 + 1


def test_how_often_one_evaluates_does_not_change_the_training(tmp_path):
    for interval in ("1", "4", "100"):
        args = [*QUICK, *"--dropout 0.3 --max_iters 6 --eval_interval".split(), interval]
        gpt_v3.train(gpt_v3.parse_args([*args, "--csv", str(tmp_path / "r.csv")]))
    losses = [(row["train_loss"], row["val_loss"]) for row in rows(tmp_path / "r.csv")]
    assert len(losses) == 3 and len(set(losses)) == 1


def test_grad_accum_equals_the_larger_batch(tmp_path):
    models = []
    for parts in ("1", "4"):
        args = [*QUICK, *"--dropout 0 --dtype float32 --batch_size 8 --grad_accum".split(), parts]
        models.append(gpt_v3.train(gpt_v3.parse_args(args))[0])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_compile_changes_nothing_but_speed(script, capsys):
    """The dropout is the same, too, on a CPU, and a block is one graph."""
    torch._dynamo.utils.counters.clear()
    losses, keys = [], []
    for flag in ("--no-compile", "--compile"):
        args = [*QUICK, flag, *"--dtype float32 --dropout 0.5 --learning_rate 0.01".split()]
        config = script.parse_args(args)
        model, _ = script.train(config)
        keys.append(list(model.state_dict()))
        losses.append(script.estimate_loss(model, script.load_data(config)[0], config))
        assert config.compile == (flag == "--compile")  # no fallback to eager
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and keys[0] == keys[1]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_flash_is_left_out_where_it_is_slower(capsys):
    def flash_after(train, *flags):
        before = flags == ("--dtype", "bfloat16") or flags[-1] == "512"
        torch.backends.cuda.enable_flash_sdp(before)  # the other way round
        train(gpt_v3.parse_args([*QUICK, *flags]))
        return torch.backends.cuda.flash_sdp_enabled()

    try:
        assert not flash_after(gpt_v3.train, "--dtype", "bfloat16")  # training does choose
        assert flash_after(gpt_v3.choose_sdpa, "--dtype", "float32")
        assert flash_after(gpt_v3.choose_sdpa, "--dtype", "bfloat16", "--block_size", "513")
        assert not flash_after(gpt_v3.choose_sdpa, "--dtype", "bfloat16", "--block_size", "512")
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@slow
def test_a_notebook_can_train_any_number_of_models():
    limits = dict(recompile_limit=2, fail_on_recompile_limit_hit=True)  # 2 for 8: a run's two, and no more
    for n_embd in ("16", "24"):
        torch.compiler.set_stance("force_eager")  # as a run leaves it that could not compile
        torch._dynamo.utils.counters.clear()
        config = gpt.parse_args([*QUICK, "--n_embd", n_embd, "--n_layer", "1", "--compile"])
        with torch._dynamo.config.patch(**limits):
            gpt.train(config)
        assert config.compile and torch._dynamo.utils.counters["frames"]["ok"] == 2


def test_compiling_is_over_before_the_clock_starts(monkeypatch):
    """Of both graphs, a training pass's and an evaluation's; the passes of grad_accum are one iteration."""
    now, passes = [0.0], []

    def model(x, y):
        passes.append(model.training)
        now[0] += 1 if len(passes) > 2 else 50
        return None, torch.zeros((), requires_grad=True).clone()

    model.train = lambda training: setattr(model, "training", training) or model
    model.zero_grad, model.parameters, model.experiment = lambda set_to_none: None, lambda: [], "gpt_v3"
    monkeypatch.setattr(gpt_v3.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(gpt_v3, "compile_blocks", lambda model, config: None)
    config = gpt_v3.parse_args([*QUICK, "--compile", "--grad_accum", "4"])
    assert gpt_v3.warm_up(model, None, None, config) == (100, 4)
    assert passes == [True, False, True] and model.training


@pytest.mark.parametrize("stopped", [False, True])
def test_a_notebook_gets_its_signals_back(monkeypatch, capsys, stopped):
    monkeypatch.setattr(sys, "argv", ["gpt_v3.py", *QUICK])
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    if stopped:
        monkeypatch.setattr(gpt_v3, "time_left", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) if stopped else contextlib.nullcontext():
        gpt_v3.main()
    assert ("stopped at step" in capsys.readouterr().err) == stopped
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_while_it_writes_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpt_v3.py", *QUICK])
    monkeypatch.setattr(gpt_v3.GPT, "generate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        gpt_v3.main()
    assert end.value.code == 130 and capsys.readouterr().err == ""


@pytest.mark.parametrize("message", [
    "CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA error: out of memory",
    "MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 4 GB on private pool.",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."])
def test_out_of_memory_is_known_on_every_machine(message):
    assert gpt.out_of_memory(RuntimeError(message))
    assert not gpt.out_of_memory(RuntimeError("CUDA error: misaligned address"))


@slow
def test_without_a_compiler_the_run_goes_on_eager(tmp_path):
    env = os.environ | {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    out, err = run("gpt_v3.py", *QUICK, "--compile", env=env)
    assert err.startswith("warning: going on without --compile: ") and "final: " in out and ", eager" in out


def test_long_runs_on_a_cpu_are_announced():
    out, _ = run("gpt.py", *QUICK)
    assert re.search(r"this will take about \d+:\d\d \(minutes:seconds\) on the CPU; --tiny", out)


def test_no_progress_line_when_piped():
    assert "\r" not in run("gpt.py", *QUICK, "--max_iters", "200", "--eval_interval", "200")[0]


# --- Bad input ---------------------------------------------------------------------------------------------

BAD_FLAGS = [
    ("--n_emb 32", "unrecognized arguments: --n_emb 32"),
    ("--frobnicate", "unrecognized arguments: --frobnicate"),
    ("--n_embd 100 --n_head 6", "--n_embd 100 is not a multiple of --n_head 6"),
    ("--n_embd 0", "argument --n_embd: 0 is not in the range [1, 1000000000000)"),
    ("--n_embd 3.5", "argument --n_embd: invalid int value: '3.5'"),
    ("--n_head", "argument --n_head: expected one argument"),
    ("--max_iters 0", "argument --max_iters: 0 is not in the range [1, 1000000000000)"),
    ("--eval_interval -3", "argument --eval_interval: -3 is not in the range [1, 1000000000000)"),
    ("--dropout 1", "argument --dropout: 1 is not in the range [0, 1)"),
    ("--dropout -0.1", "argument --dropout: -0.1 is not in the range [0, 1)"),
    ("--dropout nan", "argument --dropout: nan is not in the range [0, 1)"),
    ("--learning_rate inf", "argument --learning_rate: inf is not in the range [0, inf)"),
    ("--dtype float16", "argument --dtype: invalid choice: 'float16'"),
    ("--device cuda:77", "--device cuda:77 is not there; this machine has"),
    ("--device toaster", "--device toaster is not there; this machine has"),
    ("--device meta", "--device meta is not there; this machine has"),
    ("--device hpu", "--device hpu is not there; this machine has"),
    ("--data nowhere.txt", "--data nowhere.txt: [Errno 2] No such file or directory"),
    ("--data empty.txt", "--data empty.txt: 0 characters to train on and 0 to validate"),
    ("--data latin1.txt", "--data latin1.txt: 'utf-8' codec can't decode"),
    ("--data short.txt --block_size 8", "--data short.txt: 72 characters to train on and 8 to validate; "
                                        "--block_size 8 needs more than 8 of each"),
    ("--data .", "--data .: [Errno 21] Is a directory"),
    ("--csv nowhere/r.csv", "--csv nowhere/r.csv: its folder is not there or cannot be written to"),
    ("--csv .", "--csv .: [Errno 21] Is a directory"),
    ("--csv foreign.csv", "--csv foreign.csv: it is not a whole CSV of these scripts"),
    ("--csv torn.csv", "--csv torn.csv: it is not a whole CSV of these scripts"),
]
BAD_FLAGS_V3 = [
    ("--pe rotary", "argument --pe: invalid choice: 'rotary'"),
    ("--pe rope --n_embd 9 --n_head 3", "--pe rope works on pairs of channels: --n_embd 9 has to be even"),
    ("--pe sinpe --pe_at qk --n_embd 18 --n_head 6",
     "--pe sinpe works on pairs of channels: --n_embd 18 / --n_head 6 has to be even"),
    ("--beta2 1", "argument --beta2: 1 is not in the range [0, 1)"),
    ("--grad_accum 3", "--batch_size 64 is not a multiple of --grad_accum 3"),
]


@pytest.mark.parametrize("script,flags,message", [
    *((script, *bad) for script in (gpt, gpt_v3) for bad in BAD_FLAGS),
    *((gpt_v3, *bad) for bad in BAD_FLAGS_V3)], ids=lambda value: getattr(value, "__name__", value))
def test_bad_input_gets_one_line_and_touches_nothing(script, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
    Path("input.txt").write_text("some text " * 500)
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("ab" * 40)
    Path("latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    Path("foreign.csv").write_text("a,b\n1,2\n")
    Path("torn.csv").write_text(",".join(script.COLUMNS) + "\ngpt,None,3")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as exit:
        script.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith(f"{script.__name__}.py: error: {message}") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_flags_end_a_script_with_status_2():
    out, err = run("gpt_v2.py", "--n_embd", "100", status=2)
    assert out == "" and err == "gpt_v2.py: error: --n_embd 100 is not a multiple of --n_head 6\n"


def test_out_of_memory_names_what_to_lower(tmp_path):
    _, err = run("gpt.py", *QUICK, "--batch_size", 10**11, "--csv", tmp_path / "r.csv", status=2)
    assert err == f"gpt.py: error: out of memory: lower --batch_size {10**11} or --block_size 8\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interval", ["2", "100"])
def test_a_loss_that_is_not_finite_names_its_step_and_leaves_no_row(interval, tmp_path):
    _, err = run("gpt_v3.py", *QUICK, "--learning_rate", "1e30", "--max_iters", 9,
                 "--eval_interval", interval, "--csv", tmp_path / "r.csv", status=1)
    assert err.startswith("gpt_v3.py: error: the loss is not finite at step 1; ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- CSV ---------------------------------------------------------------------------------------------------

def append_many(path, writer):
    for i in range(50):
        gpt.append_row(path, {"experiment": writer, "n_embd": i, "data": 'a "quoted", path'})


def test_parallel_writers_tear_no_row(tmp_path):
    path = str(tmp_path / "r.csv")
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.starmap(append_many, [(path, writer) for writer in range(4)])
    got = sorted((int(row["experiment"]), int(row["n_embd"]), row["data"]) for row in rows(path))
    assert got == [(writer, i, 'a "quoted", path') for writer in range(4) for i in range(50)]
    assert Path(path).read_text().count("experiment") == 1  # one header


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
@pytest.mark.parametrize("room", [0, 10, 600])  # bytes: for nothing, part of the line, part of a new file
def test_a_full_disk_is_said_and_nothing_is_lost(room, tmp_path, capsys, monkeypatch):
    import resource
    monkeypatch.setattr(sys, "argv", ["gpt.py"])
    path = tmp_path / "r.csv"
    if room < 600:
        gpt.append_row(str(path), {"experiment": "gpt"})
    before = path.read_bytes() if path.exists() else b""
    row = {"experiment": "gpt_v2", "val_loss": 1.5, "data": "x" * 500}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            gpt.append_row(str(path), row)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert exit.value.code == 1 and err.startswith(f"gpt.py: error: --csv {path}: ") and err.count("\n") == 1
    assert "the row was gpt_v2,,,,,,1.5" in err and path.read_bytes() == before


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
    process = subprocess.Popen(**sweep_command(fake, JOBS=2, SLEEP=30),
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # nohup ignores one
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


@slow
def test_a_sweep_that_saves_goes_on_with_a_half_done_run(tmp_path):
    flags = ("--n_layer 2 --n_head 2 --n_embd 16 --batch_size 4 --block_size 8 --max_iters 1500 "
             "--eval_interval 100 --eval_iters 2 --device cpu").split()
    losses = []
    for name, env in ("whole", {}), ("cut", {"SAVE": tmp_path / "saved runs"}):
        command = ["--csv", tmp_path / f"{name}.csv", "--", *flags]
        if env:
            process = subprocess.Popen(**sweep_command(ROOT, *command, SLURM_ARRAY_TASK_ID=2, **env))
            while not list(env["SAVE"].glob("*.pt")):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert "goes on" in process.communicate(timeout=60)[1] and process.returncode == 143
            assert not (tmp_path / "cut.csv").exists()
        out, _ = sweep(ROOT, *command, SLURM_ARRAY_TASK_ID=2, **env)
        assert "done 1, skipped 0, failed 0" in out  # a second --save of the same file would be refused
        losses.append([list(row.values())[:11] for row in rows(tmp_path / f"{name}.csv")])
    assert losses[0] == losses[1] and len(losses[0]) == 1


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


def test_both_panels_of_the_encodings_have_the_same_rows():
    module = load_report()
    runs = module.read(module.PUBLISHED)  # of some of these only one loss is known
    figure = module.pe_figure(runs, {})
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    row = labels.index("768 wide, 8 heads, 12 layers")
    for axes, name in zip(figure.axes, module.LOSSES):
        drawn = sorted(line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"
                       and line.get_ydata()[0] == row)
        values = [float(rows[0][name]) for run, rows in runs.items() if run[2:] == (768, 8, 12)]
        assert drawn == pytest.approx(sorted(value - sum(values) / 3 for value in values))


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
    at = data.rindex(b"PK\1\2") + 38  # attributes of a member: 0x10 is a folder, which torch does not read
    files["folder"] = data[:at] + b"\x10" + data[at + 1:]
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


# --- The benchmark -----------------------------------------------------------------------------------------

CPU = torch.device("cpu")
BENCH = ("--T 16 --n_head 2 --n_embd 32 --batch_size 2 --rounds 1 --device cpu").split()


def run_bench(*args, **kwargs):
    command = [sys.executable, ROOT / "bench.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **kwargs)


def test_manual_is_the_arithmetic_of_head():
    torch.manual_seed(0)
    head = gpt.Head(SimpleNamespace(n_embd=24, n_head=3, block_size=10, dropout=0.0)).double()
    x = torch.randn(2, 7, 24, dtype=torch.double)
    q, k, v = (part(x).unsqueeze(1) for part in (head.query, head.key, head.value))
    mask = torch.tril(torch.ones(7, 7, dtype=torch.bool))
    torch.testing.assert_close(bench.manual(q, k, v, mask, 0.0).squeeze(1), head(x), rtol=0, atol=1e-14)


def drops_three_sixteenths(q, k, v, mask, dropout):
    return bench.manual(q, k, v, mask, 3 / 16 if dropout else 0.0)


def drops_nothing(q, k, v, mask, dropout):
    return bench.manual(q, k, v, mask, 0.0)


def not_causal(q, k, v, mask, dropout):
    return bench.manual(q, k, v, torch.ones_like(mask), dropout)


class OtherDropoutInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, dropout):
        ctx.save_for_backward(q, k, v, mask)
        ctx.dropout = dropout
        return bench.manual(q, k, v, mask, dropout)

    @staticmethod
    def backward(ctx, grad):
        *inputs, mask = ctx.saved_tensors
        inputs = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = bench.manual(*inputs, mask, ctx.dropout)
        return *torch.autograd.grad(out, inputs, grad), None, None


@pytest.mark.parametrize("dtype", bench.DTYPES.values())
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_check_tells_right_from_wrong(dtype, dropout):
    torch.manual_seed(0)
    mask = torch.tril(torch.ones(256, 256, dtype=torch.bool))
    inputs = bench.draw(3, 6, 256, 64, dtype, CPU)
    limit = bench.tolerance(dtype, CPU)
    for name in ["manual", "SDPA math", "SDPA math, bf16 sums"] + ["SDPA flash"] * (not dropout):
        assert bench.max_error(bench.CONTENDERS[name], *inputs, mask, dropout, True) < limit / 2, name
    assert bench.max_error(not_causal, *inputs, mask, 0.0, True) > limit
    not_finite = lambda *args: bench.manual(*args) * torch.nan  # noqa: E731
    assert not bench.max_error(not_finite, *inputs, mask, 0.0, False) < limit
    if dropout:
        assert bench.max_error(OtherDropoutInBackward.apply, *inputs, mask, dropout, True) > 10 * limit
        for wrong in (drops_nothing, drops_three_sixteenths):
            with pytest.raises(ArithmeticError, match="wrong .drops 0.*, not 0.2"):
                bench.max_error(wrong, *inputs, mask, dropout, False)


def test_peak_memory_is_what_a_call_allocates():
    def call():
        first = torch.empty(3 << 18)  # 3 MiB
        return torch.empty(1 << 18), first.numel()
    assert bench.peak_mib(call, CPU) == 4


def test_a_contender_that_is_wrong_or_cannot_run_is_not_timed(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
    monkeypatch.setattr(bench, "CONTENDERS", {"good": bench.manual, "wrong": not_causal, "large": fails,
                                              "flash": bench.CONTENDERS["SDPA flash"],
                                              "triton": bench.triton_flash})
    args = SimpleNamespace(batch_size=2, n_embd=32, device=CPU, rounds=1)
    rows = bench.attention_rows(32, 2, "float32", 0.2, {"float32": 1e9}, args)
    assert [row["attention"] for row in rows if not row["note"]] == ["good", "good"]
    assert all(row["ms_q1"] <= row["ms"] <= row["ms_q3"] for row in rows[:2])
    assert all(row["ms"] > 0 and row["n"] > 0 for row in rows[:2])
    assert rows[2]["note"].startswith("wrong (max error ") and "ms" not in rows[2]
    assert rows[4]["note"] == "out of memory" and "dropout" in rows[6]["note"] and rows[9]["note"]
    assert sum("good" in map(str, line) for line in bench.table(rows)) == 1


def test_bench_prints_a_table_and_writes_csv_and_figure(tmp_path):
    done = run_bench(*BENCH, "--dtype", "bfloat16", "--dropout", 0, "--csv", tmp_path / "a.csv",
                     "--plot", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1  # a well-formed table
    assert "batch 2 (smaller than on a GPU)" in done.stdout
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(bench.CONTENDERS)
    assert all(float(row["ms"]) > 0 and row["peak_mib"] for row in rows if not row["note"])
    assert {"manual", "SDPA math"} <= {row["attention"] for row in rows if not row["note"]}
    assert all(row["note"] for row in rows if row["attention"] in ("SDPA efficient", "Triton, this file"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_bench_step_times_every_rung(tmp_path, monkeypatch, capsys):
    """In eager mode: what compiling costs is the scripts' tests' business."""
    monkeypatch.setattr(bench, "RUNGS", {name: (dtype, None, fused) for name, (dtype, mode, fused)
                                         in bench.RUNGS.items() if mode != "reduce-overhead"})
    flags = f"""--step --rounds 1 --csv {tmp_path}/s.csv --batch_size 2 --block_size 16 --n_embd 16 --n_head 2
                --n_layer 1 --device cpu --data {ROOT}/input.txt"""
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler.config, "force_disable_caches", False)
        bench.main()
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["script"], row["rung"]) for row in rows] == [
        (name, rung) for name in ("gpt", "gpt_v2", "gpt_v3") for rung in bench.RUNGS]
    keys = ("ms", "tokens_per_s", "peak_mib", "matmul_share")
    assert all(float(row[key]) > 0 for row in rows for key in keys)
    assert capsys.readouterr().out.count("as above") == 3


@pytest.mark.parametrize("flags, words", [
    ("--T 256,x", "--T"), ("--T 0", "--T"), ("--T", "--T"), ("--n_head 5", "--n_head 5"),
    ("--dtype float16", "float16"),
    ("--dropout 1", "--dropout"), ("--rounds 0", "--rounds"), ("--batch_size 0", "--batch_size"),
    ("--device tpu", "--device tpu"), ("--csv no/such/folder/a.csv", "--csv"),
    ("--plot no/such/a.png", "--plot"),
    ("--csv no/such/a.csv --step", "--csv"), ("--head 6", "--head"), ("--step --plot a.png", "--plot"),
    ("--step --n_head 5", "--n_head 5"), ("extra", "extra"),
])
def test_bench_answers_a_wrong_flag_with_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse_args(flags.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1 and words in err, err


def test_bench_imports_without_triton():
    code = ("import sys; sys.modules['triton'] = None; import bench, torch; x = torch.zeros(1, 1, 1, 16);"
            "print(bench.attempt(lambda: bench.triton_flash(x, x, x, None, 0.0)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "(None, 'Triton is not installed')\n", done.stderr


# Triton's interpreter keeps bfloat16 as the uint16 of its bits, and its dot multiplies these as integers.
INTERPRET = """
import bench, json, sys, torch, triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder as Builder
dot = Builder.create_dot
Builder.create_dot = lambda self, a, b, *rest: dot(
    self, *(self.cast_impl(x, tl.float32) for x in (a, b)), *rest)
torch.manual_seed(0)
for B, H, T, hs in json.loads(sys.argv[1]):
    mask = torch.tril(torch.ones(T, T, dtype=torch.bool))
    for scale in (1, 8):  # of q: at 8 the softmax is nearly one key's
        q, k, v, grad = bench.draw(B, H, T, hs, torch.bfloat16, torch.device("cpu"))
        inputs = (q.detach() * scale, k, v, grad)
        print(bench.max_error(bench.triton_flash, *inputs, mask, 0.0, False))
        print(bench.max_error(bench.triton_flash, *(x.contiguous() for x in inputs), mask, 0.0, False))
"""


@slow
def test_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    shapes = [(2, 2, 256, 64), (1, 3, 1, 16), (2, 1, 17, 32), (1, 2, 127, 48), (1, 1, 129, 96),
              (2, 2, 64, 128),
              (1, 1, 300, 80), (1, 1, 130, 17)]
    command = [sys.executable, "-c", INTERPRET, json.dumps(shapes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 4 * len(shapes), done.stderr
    assert max(errors) < 0.01, errors  # of the largest output; a bfloat16 has 8 bits


COMPILE = """
import bench, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for hs, D, warps in ((64, 64, 4), (48, 64, 4), (32, 32, 4), (128, 128, 8)):
    names = bench.flash_kernel.arg_names
    types = dict.fromkeys(names[:4], "*bf16") | dict.fromkeys(names[4:9], "i32") | {"scale": "fp32"}
    constants = {"hs": hs, "D": D, "M": 128, "N": 64}
    source = ASTSource(bench.flash_kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    for arch in (80, 90):
        options = {"num_warps": warps, "num_stages": 2}
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
        tensor_cores = ("wgmma" if arch == 90 else "mma.sync") in ptx
        print(hs, arch, len(kernel.asm["cubin"]), tensor_cores, "bf16" in ptx, shared)
"""


@slow
def test_triton_kernel_compiles_for_gpus_ahead_of_time(tmp_path):
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)})
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 8, done.stderr
    for hs, arch, cubin, tensor_cores, bf16, shared in lines:
        assert int(cubin) > 0 and tensor_cores == bf16 == "True" and int(shared) <= 163 << 10, (hs, arch)


# --- README ------------------------------------------------------------------------------------------------

def flag_table():
    """Every flag of the three scripts as a Markdown table, from the parsers themselves."""
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argparse.ArgumentParser.parse_args", lambda self, argv: parsers.append(self) or 1 / 0)
        for script in SCRIPTS:
            with pytest.raises(ZeroDivisionError):
                script.parse_args([])
    lines = ["| flag | default | what it is |", "|---|---|---|"]
    shared = {action.dest for action in parsers[0]._actions}
    for action in parsers[2]._actions[1:]:
        names = "/".join(name for name in action.option_strings)
        default = "" if action.default is None else f"`{action.default!r}`".replace("'", "")
        text = (action.help or "").split(" (default")[0].replace("|", "\\|")
        if action.dest == "tiny":
            default, text = "", "preset for a laptop, other flags win: see `--help`"
        lines.append(f"| `{names}` | {default} | {text}{'' if action.dest in shared else ' (gpt_v3.py)'} |")
    return "\n".join(lines)


def readme():
    return (ROOT / "README.md").read_text()


def test_readme_has_every_flag():
    assert flag_table() in readme()


def test_readme_has_the_steps_that_were_measured():
    texts = ("script", "rung", "dtype", "note", "device", "torch", "command")
    measured = [{name: value if name in texts else float(value) if value else None
                 for name, value in row.items()} for row in rows(ROOT / "results/bench_cpu_step.csv")]
    lines = [f"| {' | '.join(cells)} |" for cells in bench.table(measured)][1:]
    assert len(lines) == 12 and "\n".join(lines) in (ROOT / "README.md").read_text()


def test_readme_has_the_literal_diff():
    one, two = ((ROOT / name).read_text().splitlines() for name in ("gpt.py", "gpt_v2.py"))
    lines = difflib.unified_diff(one, two, "gpt.py", "gpt_v2.py", lineterm="", n=0)
    shown = readme().split("```diff\n")[1].split("```")[0]
    assert shown == "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(flag_table())
