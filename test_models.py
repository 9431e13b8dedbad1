"""Tests of the scripts, the sweep, the report and the benchmark, in the order of the README.

    python -m pytest -n 2                  all of them, in less than four minutes on two cores
    python -m pytest -n 2 -m "not slow"    the quick ones, in less than one
    python -m pytest -k rope               those of one promise: mask, cache, best, schedule, resume, csv, ...
"""
import csv, difflib, importlib.util, io, itertools, math, multiprocessing, os, pickle, random, re
import resource, shlex, shutil, signal, subprocess, sys, time, types, warnings, zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small for more
import hypothesis, pytest, torch
from hypothesis import strategies
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bench, gpt, gpt_v2, gpt_v3

ROOT = Path(__file__).parent
SCRIPTS = [gpt, gpt_v2, gpt_v3]
TEXT = (ROOT / "input.txt").read_text()[:20000]
CHARS = sorted(set(TEXT))
QUICK = """--batch_size 4 --block_size 8 --n_embd 16 --n_head 2 --n_layer 2 --max_iters 4 --eval_interval 2
    --eval_iters 2 --max_new_tokens 20 --device cpu"""  # a run of a moment

pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.jit|npickler|non-tuple|autocast|FP_FUSION|kernel)")
warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # there is no file to register them in
slow = pytest.mark.slow  # more than a few seconds
on_gpu = pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=["gpt", "gpt_v2", "gpt_v3"])
each_device = pytest.mark.parametrize("device", ["cpu", on_gpu])
each_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
each_pe = pytest.mark.parametrize("pe", ["randn", "sinpe", "rope"])
each_pe_at = pytest.mark.parametrize("pe_at", ["input", "qk"])
each_attn = pytest.mark.parametrize("attn", ["mha", "mqa", "gqa", "mla"])

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a folder with a short text."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT)
    return tmp_path

def split(*flags):
    return shlex.split(" ".join(map(str, flags)))

def run(script, *flags):
    """Run a script in this process -> exit status, standard output, standard error."""
    status = 0
    out = io.StringIO()
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *split(*flags)])
        try:
            script.main()
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()

def succeed(script, *flags):
    """Run a script that has to end well, without a word on standard error -> its standard output."""
    status, out, err = run(script, *flags)
    assert (status, err) == (0, "")
    return out

def refuse(script, *flags, says="", status=2):
    """Run a script that has to end with one line on standard error, with words in it, as "one / other"."""
    result, out, err = run(script, *flags)
    assert result == status, err
    assert re.fullmatch(r"[\w.]+: (error: |stopped ).*\n", err), err
    for word in says.split(" / "):
        assert word in err
    assert status != 2 or "step" not in out  # what is wrong is said before the training
    return err

def train(script, *flags):
    """The model that a script trains."""
    with redirect_stdout(io.StringIO()):
        model, chars = script.train(script.parse_args(split(QUICK, *flags)))
    return model

def rows(path="r.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))

def row_of(script, *flags):
    """The row of a small run."""
    succeed(script, QUICK, "--csv r.csv", *flags)
    return rows()[-1]

def result(row):
    """Of a row, what has to be the same when the run is repeated."""
    names = "experiment pe_type train_loss val_loss best_val_loss best_iter published_val_loss flags curve"
    return [row[name] for name in names.split()]

def start(*command, **options):
    """Start Python with a command line, its output into pipes."""
    return subprocess.Popen([sys.executable, *split(*command)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)

def finish(process):
    """Wait for a process -> exit status, standard output, standard error."""
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err

def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)

def files():
    return {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}

# --- The three files -------------------------------------------------------------------------------------
def test_the_text_is_tiny_shakespeare():
    text = (ROOT / "input.txt").read_bytes()
    assert zlib.crc32(text) == 3747689809
    assert (ROOT / "results/laptop.txt").read_bytes() == text[:32768]

def test_gpt_and_gpt_v2_differ_in_docstring_and_model_alone_and_the_readme_shows_how():
    texts = [(ROOT / name).read_text() for name in ("gpt.py", "gpt_v2.py")]
    one, two = [re.sub(r'(?s)\A""".*?"""|# --- Model.*?(?=# --- Data)', "", text) for text in texts]
    assert one == two and "def train" in one
    lines = [text.splitlines() for text in texts]
    diff = list(difflib.unified_diff(*lines, "gpt.py", "gpt_v2.py", lineterm="", n=0))
    assert len([line for line in diff[2:] if line[0] in "+-" and line[1:].strip()]) <= 24
    assert "```diff\n" + "\n".join(diff) + "\n```" in (ROOT / "README.md").read_text()

def test_an_import_has_no_side_effects():
    code = """import sys, torch; state = torch.get_rng_state(); import gpt, gpt_v2, gpt_v3
assert torch.equal(state, torch.get_rng_state()) and 'torch._dynamo' not in sys.modules"""
    before = files()
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    assert finish(start("-c", shlex.quote(code), env=env)) == (0, "", "")
    assert files() == before

@slow
def test_help_needs_neither_a_cache_folder_nor_docstrings():
    names = "TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR XDG_CACHE_HOME HOME TMPDIR".split()
    env = os.environ | dict.fromkeys(names, "/dev/null/nowhere")
    status, out, err = finish(start("-OO", ROOT / "gpt.py", "--help", env=env))
    assert (status, err) == (0, "") and "--learning_rate" in out

@slow
@each_script
def test_a_script_copied_alone_runs_and_outlives_a_reader_that_has_left(script):
    """As in `python gpt.py --csv r.csv | head -n 3`."""
    shutil.copy(script.__file__, ".")
    command = f"{sys.executable} {script.__name__}.py {QUICK} --max_iters 100 --csv r.csv | head -n 3"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command.replace("\n", " ")], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.count(b"\n") == 3
    assert len(rows()) == 1

# --- The models ------------------------------------------------------------------------------------------
KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}

def make(script, flags=""):
    """A small model in float64, its weights large enough for attention to matter."""
    small = "--block_size 12 --n_embd 48 --n_head 4 --n_layer 2 --dropout 0 --device cpu --dtype float32"
    torch.manual_seed(0)
    model = script.GPT(script.parse_args(split(small, flags)), 11).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model

def tokens(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))

def heads_of(x, n):
    """(B, T, n hs) -> (B, n, T, hs)"""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)

def joined(heads):
    """(B, n, T, hs) -> (B, T, n hs)"""
    return heads.transpose(1, 2).flatten(2)

def attention(q, k, v):
    """Causal attention of each head by its formula (Vaswani et al. 2017): (..., T, hs) -> (..., T, hs)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    mask = torch.ones(scores.shape[-2:]).tril().bool()
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v

def assert_logits(model, x, expected):
    """A model must return these logits, and their cross-entropy as its loss."""
    targets = x.flip(0)
    logits, loss = model(x, targets)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, -expected.log_softmax(-1).gather(-1, targets[..., None]).mean())
    assert model(x)[1] is None

@pytest.mark.parametrize("script", [gpt, gpt_v2], ids=["gpt", "gpt_v2"])
def test_the_model_of_the_lecture_is_its_formula(script):
    model = make(script)
    x = tokens(3, 10)
    h = model.token_embedding_table.weight[x] + model.position_embedding_table.weight[:10]
    for block in model.blocks:
        y = block.ln1(h)
        heads = [attention(head.query(y), head.key(y), head.value(y)) for head in block.sa.heads]
        h = h + block.sa.proj(torch.cat(heads, dim=-1))
        up, _, down, _ = block.ffwd.net
        h = h + down(up(block.ln2(h)).relu())
    assert_logits(model, x, model.ln_f(h) @ model.lm_head.weight.T + model.lm_head.bias)

@each_pe
@each_pe_at
@each_attn
@pytest.mark.parametrize("mlp", ["gelu", "vq"])
def test_gpt_v3_is_its_formula(pe, pe_at, attn, mlp):
    model = make(gpt_v3, f"--pe {pe} --pe_at {pe_at} --attn {attn} --mlp {mlp}")
    x = tokens(3, 10)
    h = model.wte.weight[x]
    if pe_at == "input":
        h = model.pe(h)
    for block in model.blocks:
        y = block.ln_1(h)
        if attn == "mla":
            heads = latent_heads(block.attn, y)
        else:
            heads = grouped_heads(block.attn, y, KV_HEADS[attn])
        h = h + block.attn.c_proj(joined(attention(*heads)))
        y = block.ln_2(h)
        if mlp == "gelu":
            h = h + block.mlp.c_proj(F.gelu(block.mlp.c_fc(y), approximate="tanh"))
        else:  # attention of each head to its codebook
            q = heads_of(y, 4)
            codes = block.mlp.codebook
            h = h + joined((q @ codes.mT / math.sqrt(12)).softmax(-1) @ codes)
    assert_logits(model, x, model.ln_f(h) @ model.lm_head.weight.T)

def grouped_heads(layer, x, n):
    """q, k and v (B, 4, T, hs) of mha, gqa and mqa, the n heads of k and v repeated."""
    encode = layer.pe or torch.nn.Identity()
    q, k, v = layer.c_attn(x).split([48, 12 * n, 12 * n], dim=-1)
    k = encode(heads_of(k, n)).repeat_interleave(4 // n, dim=1)
    v = heads_of(v, n).repeat_interleave(4 // n, dim=1)
    return encode(heads_of(q, 4)), k, v

def latent_heads(layer, x):
    """q, k and v of mla, from a latent of 24 channels; at qk, 6 more in q and k are for the position."""
    encode = layer.pe or torch.nn.Identity()
    extra = 6 if layer.pe else 0
    q, q_pe = heads_of(layer.c_q(x), 4).split([12, extra], dim=-1)
    latent, k_pe = layer.c_latent(x).split([24, extra], dim=-1)
    k, v = layer.c_kv(layer.ln_latent(latent)).split(48, dim=-1)
    k_pe = encode(k_pe)[:, None].expand(-1, 4, -1, -1)
    q = torch.cat((q, encode(q_pe)), dim=-1)
    k = torch.cat((heads_of(k, 4), k_pe), dim=-1)
    return q, k, heads_of(v, 4)

def test_sinpe_adds_and_rope_rotates_by_the_angles_of_their_papers():
    sinpe, rope = [make(gpt_v3, f"--n_embd 8 --pe {pe}").pe for pe in ("sinpe", "rope")]
    x = torch.randn(2, 5, 8, dtype=torch.double)
    angle = torch.arange(5)[:, None] * 10000 ** (-torch.tensor([0, 2, 4, 6]) / 8)
    wave = torch.stack((angle.sin(), angle.cos()), dim=-1)
    torch.testing.assert_close(sinpe(x), x + wave.flatten(1))
    rotated = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.exp(1j * angle)
    torch.testing.assert_close(rope(x), torch.view_as_real(rotated).flatten(-2))

def test_randn_adds_small_noise_that_is_the_same_for_every_sequence():
    noise = make(gpt_v3, "--pe randn --block_size 1000").pe(torch.zeros(2, 1000, 48))
    assert torch.equal(noise[0], noise[1])
    assert noise.std().item() == pytest.approx(0.02, abs=2e-4)

@pytest.mark.parametrize("script,flags", [
    (gpt, ""), (gpt_v2, ""), (gpt_v3, ""), (gpt_v3, "--pe_at qk --attn mla --mlp vq")])
def test_the_mask_hides_what_comes_later(script, flags):
    model = make(script, flags)
    x = tokens(1, 12)
    other = x.clone()
    other[0, 7] += 1
    changes = (model(other)[0] - model(x)[0]).abs().amax(dim=(0, 2))
    assert changes[:7].max() < 1e-12 and changes[7:].min() > 1e-6

@each_script
def test_weights_start_small_biases_at_zero_and_the_loss_at_that_of_a_guess(script):
    torch.manual_seed(0)
    model = script.GPT(script.parse_args(["--device", "cpu"]), 65)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, abs=1e-3), name
        elif "bias" in name:
            assert not p.any(), name
    _, loss = model(torch.randint(65, (2, 64)), torch.randint(65, (2, 64)))
    assert loss.item() == pytest.approx(math.log(65), abs=0.1)

# --- Sampling --------------------------------------------------------------------------------------------
@each_pe
@each_pe_at
@each_attn
def test_a_cache_changes_no_logit_however_the_tokens_are_split_and_holds_what_it_must(pe, pe_at, attn):
    model = make(gpt_v3, f"--pe {pe} --pe_at {pe_at} --attn {attn}").eval()
    x = tokens(2, 12)
    expected, _ = model(x)
    for sizes in ([1] * 12, [12], [4] + [1] * 8, [5, 7], [1, 2, 3, 1, 5]):
        cache = gpt_v3.Cache()
        logits = [model(part, cache=cache)[0] for part in x.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-9)
    kept = sum(tensor.numel() for layer in cache.tensors.values() for tensor in layer)
    per_token = {"mha": 96, "gqa": 48, "mqa": 24, "mla": 30 if pe_at == "qk" else 24}
    assert kept == 2 * 2 * 12 * per_token[attn]  # layers, sequences, tokens
    with pytest.raises(ValueError, match="13 tokens are more than the block_size of 12"):
        model(x[:, :1], cache=cache)

@each_pe
@pytest.mark.parametrize("length", [1, 20])
def test_past_block_size_sampling_with_a_cache_starts_over_from_the_last_half(pe, length):
    model = make(gpt_v3, f"--pe {pe} --pe_at qk").eval()
    idx = tokens(1, length)
    context = idx
    for token in model.generate(idx, 30, temperature=0)[0, length:]:
        if context.shape[1] > 12:
            context = context[:, -6:]
        assert token == model(context)[0][0, -1].argmax()
        context = torch.cat((context, token.view(1, 1)), dim=1)

@each_script
def test_samples_follow_the_probabilities_of_the_model(script):
    model = make(script).eval()
    idx = tokens(1, 5).expand(4000, 5)
    logits = model(idx[:1])[0][0, -1]

    def assert_shares(probabilities, **options):
        samples = model.generate(idx, 1, **options)[:, -1]
        shares = samples.bincount(minlength=11) / 4000
        torch.testing.assert_close(shares.double(), probabilities, rtol=0, atol=0.03)
    assert_shares(logits.softmax(-1))
    if script is gpt_v3:
        assert_shares((logits / 4).softmax(-1), temperature=4.0)
        third = logits.sort().values[-3]
        assert_shares(logits.masked_fill(logits < third, -math.inf).softmax(-1), top_k=3)

class Dtypes(TorchDispatchMode):
    """Collects the dtypes of the matrix products that are computed meanwhile."""
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if re.match(r"aten\.(mm|addmm|bmm|baddbmm|_scaled_dot)", str(function)):
            self.seen.add(args[1].dtype)
        return function(*args, **kwargs or {})

@each_dtype
@pytest.mark.parametrize("script,flags", [
    (gpt, ""), (gpt_v2, ""), (gpt_v3, ""), (gpt_v3, "--optimizer muon"), (gpt_v3, "--generate run.pt")])
def test_matrix_products_of_training_and_sampling_are_in_dtype(saved, script, flags, dtype):
    """Those inside SDPA, too, which has no fused kernel for dropout on a CPU. Muon's, because in bfloat16
    they take 30 times as long on a CPU without instructions for it."""
    with Dtypes() as dtypes:
        succeed(script, QUICK, "--dropout 0.2 --dtype", dtype, flags)
    assert dtypes.seen == {getattr(torch, dtype)}

@pytest.fixture
def saved():
    """run.pt holds a small run."""
    succeed(gpt_v3, QUICK, "--save run.pt")

def load(path):
    return torch.load(path, weights_only=True)

def test_a_saved_run_is_sampled_the_same_with_the_same_seed(saved):
    def sample(*flags):
        return succeed(gpt_v3, "--generate run.pt --max_new_tokens 40 --device cpu", *flags)

    assert sample("--seed 1") == sample("--seed 1") != sample("--seed 2")
    assert sample("--top_k 1 --seed 1") == sample("--top_k 1 --seed 2") == sample("--temperature 0")
    assert len(sample()) == 1 + 40 + 1  # the first character, the sample, a line end
    assert re.fullmatch(r"(?s)ROMEO:.{40}\n", sample("--prompt ROMEO:"))
    *texts, rest = sample("--num_samples 3 --prompt ROMEO:").split("\n" + 20 * "-" + "\n")
    assert [len(text) for text in texts] == [46, 46, 46] and len(set(texts)) == 3
    assert all(text.startswith("ROMEO:") for text in texts) and rest == ""
    refuse(gpt_v3, "--generate run.pt --device cpu --prompt a€", says="--prompt / €")

def test_a_sample_is_written_while_it_is_drawn(saved):
    process = start(ROOT / "gpt_v3.py", "--generate run.pt --max_new_tokens 1000000 --prompt ROMEO:")
    assert process.stdout.read(20).startswith("ROMEO:")
    process.terminate()
    process.communicate()

# --- Dropout and evaluation ------------------------------------------------------------------------------
@each_device
@pytest.mark.parametrize("script,compiled", [
    (gpt, False), (gpt_v2, False), (gpt_v3, False), pytest.param(gpt_v3, True, marks=slow)])
def test_dropout_masks_have_their_share_and_serve_both_passes(script, device, compiled):
    """All weights of a block are zero but the last bias: its output for zeros is its last mask / 0.8."""
    config = script.parse_args(split("--n_embd 64 --n_head 1 --block_size 32 --dropout 0.2 --device", device))
    block = script.Block(config).to(device)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    *_, last = [layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
    torch.nn.init.ones_(last.bias)
    if compiled:
        torch.compiler.reset()
        block.compile()
    torch.manual_seed(0)
    out, other = [block(torch.zeros(8, 32, 64, device=device)) for _ in range(2)]
    assert out.unique().tolist() == [0, 1.25]
    for sample in (out, other, out * other, out[..., 1:] * out[..., :-1]):
        assert sample.mean().item() == pytest.approx(1, abs=0.03)  # five standard deviations
    grad = torch.randn_like(out)
    bias_grad, = torch.autograd.grad(out, last.bias, grad)
    torch.testing.assert_close(bias_grad, (grad * out).sum((0, 1)), rtol=0, atol=1e-3)

@each_script
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_evaluation_is_the_mean_loss_of_evenly_spaced_windows_and_repeats_itself(script, dropout):
    config = script.parse_args(split(QUICK))
    data = tokens(500)
    model = make(script, f"--block_size 8 --dropout {dropout}")
    state = torch.get_rng_state()
    loss = script.estimate_loss(model, data, config)
    assert script.estimate_loss(model, data, config) == loss
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    starts = torch.arange(8) * 491 // 7  # the first and the last window are among them
    windows = torch.stack([data[i:i + 9] for i in starts])
    _, expected = model.eval()(windows[:, :-1], windows[:, 1:])
    assert loss == pytest.approx(expected.item(), abs=1e-6)

def test_the_published_losses_have_dropout_in_attention_alone():
    config = gpt_v3.parse_args(split(QUICK))
    data = tokens(500)
    model = make(gpt_v3, "--block_size 8 --dropout 0.5")
    loss = gpt_v3.estimate_loss(model, data, config)
    published = gpt_v3.estimate_loss(model, data, config, attention_dropout=True)
    assert published != loss == gpt_v3.estimate_loss(model, data, config)
    for block in model.blocks:
        block.attn.dropout = 0.0
    assert gpt_v3.estimate_loss(model, data, config, attention_dropout=True) == loss

@each_script
def test_how_often_a_run_is_evaluated_does_not_change_it(script):
    losses = {row_of(script, "--dropout 0.3 --max_iters 6 --eval_interval", interval)["val_loss"]
              for interval in (1, 4, 100)}
    assert len(losses) == 1

# --- Training --------------------------------------------------------------------------------------------
def by_hand(script, config, make_optimizers, rates, clip=math.inf):
    """The final losses of a script's training, written as the usual loop; rates(step) are those of the
    optimizers."""
    torch.manual_seed(config.seed)
    data = torch.tensor([CHARS.index(char) for char in TEXT])
    model = script.GPT(config, len(CHARS))
    optimizers = make_optimizers(model)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.max_iters):
        start = torch.randint(18000 - config.block_size, (config.batch_size,), generator=generator)
        window = torch.stack([data[i:i + config.block_size + 1] for i in start])
        _, loss = model(window[:, :-1], window[:, 1:])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer, rate in zip(optimizers, rates(step)):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    return [script.estimate_loss(model, split, config) for split in data.split(18000)]

def trained(script, *flags):
    """The final losses in the row of a run, and its flags."""
    flags = ["--max_iters 30 --eval_interval 30 --dtype float32 --dropout 0.1", *flags]
    row = row_of(script, *flags)
    return [float(row["train_loss"]), float(row["val_loss"])], script.parse_args(split(QUICK, *flags))

@each_script
def test_training_is_the_usual_loop_with_adamw(script):
    losses, config = trained(script, "--learning_rate 1e-2")

    def optimizers(model):
        return [torch.optim.AdamW(model.parameters(), weight_decay=0.01)]

    assert losses == pytest.approx(by_hand(script, config, optimizers, lambda step: [1e-2]), abs=1e-5)

def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest_at_twice_the_rate_of_a_schedule():
    losses, config = trained(gpt_v3, "--optimizer muon --learning_rate 1e-2 --weight_decay 0.3 --beta2 0.9 "
                             "--warmup_iters 5 --min_lr 1e-3 --grad_clip 0.5")

    def optimizers(model):
        matrices = [p for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2]
        rest = [p for name, p in model.named_parameters() if "blocks" not in name or p.ndim == 1]
        return [torch.optim.AdamW(rest, betas=(0.9, 0.9), weight_decay=0),
                gpt_v3.Muon(matrices, 1e-2, 0.3, torch.float32)]

    def rates(step):
        rate = 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 5) / 25)) / 2
        if step < 5:
            rate = 1e-2 * (step + 1) / 5
        return [2 * rate, rate]

    assert losses == pytest.approx(by_hand(gpt_v3, config, optimizers, rates, clip=0.5), abs=1e-4)

@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0), (torch.float32, 1e-3)])
@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_muon_is_that_of_pytorch_in_any_precision(shape, dtype, tolerance):
    start = torch.randn(shape)
    ours = start.clone()
    theirs = start.clone()
    optimizers = (gpt_v3.Muon([ours], 1e-2, 0.3, dtype),
                  torch.optim.Muon([theirs], 1e-2, 0.3, adjust_lr_fn="match_rms_adamw"))
    for _ in range(4):
        ours.grad = torch.randn(shape) / 1000
        theirs.grad = ours.grad
        for optimizer in optimizers:
            optimizer.step()
    assert (theirs - start).abs().max() > 0.03
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)

def test_micro_batches_add_up_to_the_batch():
    whole, _ = trained(gpt_v3, "--dropout 0 --learning_rate 1e-2")
    parts, _ = trained(gpt_v3, "--dropout 0 --learning_rate 1e-2 --grad_accum 4")
    assert parts == pytest.approx(whole, abs=1e-4)

@each_script
def test_the_alphabet_is_learned(script):
    Path("input.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 40)
    flags = "--max_iters 150 --eval_interval 150 --learning_rate 1e-2 --dropout 0"
    out = succeed(script, QUICK, flags)
    assert re.search(r"final: train loss 0\.0[01]\d\d, val loss 0\.0[01](?s:.*)\nabcdefghijklmnopqrst", out)

@pytest.fixture
def compile_with(monkeypatch):
    """compile_with(backend) replaces inductor, which needs a C++ compiler and a minute."""
    compile = torch.compile

    def replace(backend):
        monkeypatch.setattr(torch, "compile", lambda *args, mode=None, options=None, **others: compile(
            *args, backend=backend, **others))
    torch.compiler.set_stance("default")
    torch._dynamo.utils.counters.clear()
    return replace

def assert_graphs(count):
    """So many pieces of code must have been compiled, each without a break."""
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == count and not counters["graph_break"]

@each_script
def test_compiling_makes_a_graph_for_training_and_one_for_evaluation_whatever_the_depth(script, compile_with):
    compile_with("eager")
    compiled, eager = [row_of(script, "--n_layer 3 --dropout 0", choice) for choice in ("--compile", "")]
    assert_graphs(2)
    assert result(compiled) == result(eager)

@each_script
def test_without_a_compiler_a_run_continues_and_the_next_one_tries_again(script, compile_with):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler")

    compile_with(no_compiler)
    status, out, err = run(script, QUICK, "--compile")
    assert status == 0 and "final: " in out
    assert re.fullmatch(rf"{script.__name__}.py: warning: continuing without --compile: .*\n", err)
    torch._dynamo.utils.counters.clear()
    compile_with("eager")
    succeed(script, QUICK, "--compile")
    assert_graphs(2)

@slow
@pytest.mark.parametrize("script,flags", [(gpt, ""), (gpt_v3, "--pe rope --pe_at qk --grad_accum 2")])
def test_inductor_changes_no_loss(script, flags):
    models = [train(script, "--dropout 0 --dtype float32", flags, choice).state_dict()
              for choice in ("--no-compile", "--compile")]
    torch.testing.assert_close(*map(dict, models), rtol=1e-3, atol=1e-4)  # and the names of the weights

@pytest.mark.parametrize("script,block_size,flash", [
    (gpt_v2, 512, True), (gpt_v3, 512, False), (gpt_v3, 513, True)])
def test_a_model_chooses_the_kernels_of_its_attention(script, block_size, flash):
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(True)
    make(script, f"--dtype bfloat16 --block_size {block_size}")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == flash

@pytest.mark.parametrize("device", [on_gpu])
@each_script
def test_cuda_graphs_train_like_the_eager_model_and_draw_new_masks(script, device):
    flags = "--device cuda --dtype float32 --max_iters 12 --eval_interval 6"
    graphs, eager = [float(row_of(script, flags, "--dropout 0", choice)["train_loss"])
                     for choice in ("--compile", "--no-compile")]
    assert graphs == pytest.approx(eager, abs=1e-3)
    config = script.parse_args(split(QUICK, flags, "--dropout 0.5"))
    model = script.GPT(config, 11).cuda()
    data = tokens(500).cuda()
    script.compile_blocks(model, data, config)
    start = torch.zeros(config.batch_size, dtype=torch.long, device="cuda")
    losses = {script.compute_loss(model, data, start, config).item() for _ in range(3)}
    assert len(losses) == 3  # dropout

# --- What a run prints -----------------------------------------------------------------------------------
@each_script
def test_progress_in_a_file_is_lines(script):
    out = succeed(script, QUICK, "--max_iters 22 --eval_interval 11")
    loss = r": train loss \d\.\d{4}, val loss \d\.\d{4}"
    speed = r" \| \d+\.\d\d ms/iter, \d+k tok/s, eta 0:0\d"
    lines = [rf"{script.__name__}: 0.01M parameters, cpu, (bfloat16|float32), eager",
             "--tiny is a preset for a laptop", f"step 0{loss}", f"step 10{speed}", f"step 11{loss}{speed}",
             f"step 22{loss}{speed}", rf"final{loss} \(best \d\.\d{{4}} at step (11|22)\)", "(?s:.{21})", ""]
    assert re.fullmatch("\n".join(lines), out)
    out = succeed(script, QUICK, "--tiny --max_new_tokens 0")
    assert "--tiny is" not in out and out.endswith("at step 4)\n")

@each_script
def test_times_leave_out_evaluation_and_eta_has_it(script):
    began = time.perf_counter()
    row = row_of(script, "--max_iters 30 --eval_interval 10 --eval_iters 100")
    train_s = float(row["train_s"])
    assert 0 < train_s < (time.perf_counter() - began) / 2
    assert float(row["ms_per_iter"]) * 30 == pytest.approx(1000 * train_s, abs=10)
    config = types.SimpleNamespace(batch_size=4, block_size=500, max_iters=100, eval_interval=30)
    assert script.speed(20, 40.0, 5.0, config) == " | 2000.00 ms/iter, 1k tok/s, eta 2:55"
    assert script.speed(20, 0.02, 1.0, config) == " | 1.00 ms/iter, 2.00M tok/s, eta 0:03"

def test_times_leave_out_saving(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: time.sleep(0.3))  # a slow disk
    row = row_of(gpt_v3, "--max_iters 2 --eval_interval 1 --save run.pt")
    assert float(row["train_s"]) < 0.3

def on_terminal(columns, command):
    """What a command writes to a terminal of this width, and how it ends."""
    done = subprocess.run(["script", "-qec", f"unset COLUMNS; stty cols {columns}; {command}", "/dev/null"],
                          stdin=subprocess.DEVNULL, capture_output=True)
    return done.stdout.decode().replace("\r\n", "\n"), done.returncode

@slow
@pytest.mark.parametrize("script,columns", [(gpt, 40), (gpt_v3, 80)])
def test_progress_on_a_terminal_is_one_line_that_leaves_nothing_behind(script, columns):
    """What is written between two erasures is a progress line, which fits, or lines that stay."""
    quick = " ".join(split(QUICK, "--max_new_tokens 0 --eval_interval 100"))
    command = f"{sys.executable} {script.__file__} {quick}"
    text, status = on_terminal(columns, f"{command} --max_iters 100")
    parts = text.split("\r\x1b[K")
    progress = [part for part in parts if part and not part.endswith("\n")]
    assert status == 0 and len(progress) == 9
    assert all(len(line) < columns and re.match(r"step \d+0 \| ", line) for line in progress)
    stay = "".join(part for part in parts if part.endswith("\n"))
    assert re.fullmatch(r"gpt.*\n--tiny.*\nstep 0: .*\nstep 100: .*\nfinal: .*\n", stay)
    text, status = on_terminal(columns, f"timeout --preserve-status 9 {command} --max_iters 1000000")
    assert status == 143
    assert re.fullmatch(rf"{script.__name__}\.py: stopped at step \d+\n", text.split("\r\x1b[K")[-1])

# --- Flags -----------------------------------------------------------------------------------------------
@each_script
def test_the_default_flags_are_the_experiment_and_other_flags_override_tiny(script, monkeypatch):
    default = script.parse_args([])
    published = rows(ROOT / "results/seed.csv")[SCRIPTS.index(script)]
    flags = published["flags"].replace("--pe randn", "--pe sinpe")
    assert script.parse_args(split(flags)) == default
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "/run/kernel-1.json"])
    assert script.parse_args() == default  # in a notebook
    tiny = script.parse_args(split("--tiny --n_layer 3 --dropout=0.1"))
    assert tiny == script.parse_args(split("--n_layer 3 --dropout=0.1 --tiny"))
    assert (tiny.n_layer, tiny.dropout, tiny.seed) == (3, 0.1, 1337) and tiny.n_embd < 384

BAD_FLAGS = """
    --n_emb 32                          --n_emb
    --frobnicate                        --frobnicate
    --n_head                            --n_head
    --n_embd 100 --n_head 6             --n_embd 100 / --n_head 6
    --n_embd 0                          --n_embd: must be between 1 and / not 0
    --n_embd 3.5                        --n_embd / number / 3.5
    --n_layer 99999999999               --n_layer / 1000000000
    --eval_interval -3                  --eval_interval: must be between 1 and / not -3
    --dropout 1                         --dropout: must be between 0 and 0.99, not 1
    --dropout nan                       --dropout / nan
    --learning_rate inf                 --learning_rate: must be between 0 and 10, not inf
    --seed -1                           --seed: must be / not -1
    --max_new_tokens -1                 --max_new_tokens / not -1
    --dtype float16                     --dtype / float16 / bfloat16
    --device toaster                    --device / toaster / cpu
    --data nowhere.txt                  --data nowhere.txt / No such file / https:// / input.txt
    --data empty.txt                    --data empty.txt / --block_size
    --data .                            --data .
    --data latin1.txt                   --data latin1.txt / utf-8 / UTF-8
    --data short.txt --block_size 8     --data short.txt / --block_size 8
    --csv nowhere/r.csv                 --csv nowhere/r.csv / No such file
    --csv .                             --csv . / directory
    --csv foreign.csv                   --csv foreign.csv / columns"""
BAD_FLAGS_OF_V3 = """
    --pe rotary                                         --pe / rotary / rope
    --pe rope --n_embd 9 --n_head 3                     --pe rope / even / 9
    --pe sinpe --pe_at qk --n_embd 18 --n_head 6        --pe sinpe / qk / --n_embd 18 / even / 3
    --pe rope --pe_at qk --attn mla --n_embd 12 --n_head 2    --pe rope / --n_head 2 / even / 3
    --pe randn --pe_at qk --attn mla --n_embd 4 --n_head 4    --pe randn / --n_embd 4 / 0
    --attn gqa --n_head 6 --n_kv_head 4                 --n_head 6 / --n_kv_head 4
    --attn gqa --n_head 9 --n_embd 90                   --n_head 9 / --n_kv_head 4
    --n_kv_head 2                                       --n_kv_head 2 / gqa
    --attn mqa --kv_rank 2                              --kv_rank 2 / mla
    --attn mla --kv_rank -1                             --kv_rank / not -1
    --codebook 9                                        --codebook 9 / vq
    --beta2 1                                           --beta2 / 0.99999
    --grad_accum 3                                      --batch_size / --grad_accum 3
    --top_k 0                                           --top_k / not 0
    --min_lr -1                                         --min_lr / not -1
    --resume nowhere.pt                                 nowhere.pt / No such file
    --save no/run.pt                                    --save no/run.pt / folder
    --save foreign.csv                                  --save foreign.csv / already exists
    --resume a.pt --generate a.pt                       --resume / --generate / exclusive
    --generate a.pt --init_from a.pt                    --init_from / --generate / exclusive"""

def cases(table):
    """Each line of a table: flags, and the words of the message about them."""
    return [re.split(" {2,}", line.strip()) for line in table.strip().splitlines()]

@pytest.mark.parametrize("script,flags,words", [
    *((gpt, *case) for case in cases(BAD_FLAGS)),
    *((gpt_v3, *case) for case in cases(BAD_FLAGS + BAD_FLAGS_OF_V3))])
def test_bad_flags_get_one_line_and_nothing_is_touched(script, flags, words):
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("ab" * 40)
    Path("foreign.csv").write_text("a,b\n1,2\n")
    Path("latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    before = files()
    refuse(script, "--device cpu", flags, says=words)
    assert files() == before

ODD_WORDS = "- -- --tiny inf nan 1e400 cpu cuda:-1 cuda mps xla meta hpu rope qk . .. /dev/null".split()
WORDS = (strategies.text(strategies.characters(exclude_characters="\0"), max_size=8)
         | strategies.floats().map(str)
         | strategies.integers(-2, 2**70).map(str)
         | strategies.sampled_from(ODD_WORDS))
NAMES = strategies.sampled_from([*vars(gpt_v3.parse_args([])), "x"])

@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None,
                     suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(strategies.lists(strategies.tuples(NAMES, WORDS), max_size=4))
def test_any_flags_are_taken_or_refused_in_one_line(flags):
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        try:
            gpt_v3.parse_args([f"--{flag}={word}" for flag, word in flags])
            assert err.getvalue() == ""
        except SystemExit as end:
            assert end.code == 2 and len(err.getvalue().splitlines()) == 1

# --- Rows ------------------------------------------------------------------------------------------------
COLUMNS = """experiment,pe_type,n_embd,n_head,n_layer,train_loss,val_loss,best_val_loss,best_iter,
    published_train_loss,published_val_loss,params,ms_per_iter,train_s,device,torch,data,data_crc32,flags,
    curve""".replace("\n    ", "")
EVERYTHING = """--pe rope --pe_at qk --min_lr 1e-4 --warmup_iters 2 --grad_clip 0.5 --grad_accum 2
    --beta2 0.95 --attn gqa --n_kv_head 1 --mlp vq --codebook 9 --optimizer muon --weight_decay 0.3"""

@pytest.mark.parametrize("script,flags", [(gpt, ""), (gpt_v2, ""), (gpt_v3, EVERYTHING)])
def test_the_flags_in_a_csv_row_repeat_its_run(script, flags, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # which alone is not torchrun's
    row = row_of(script, "--dropout 0.1 --seed 7 --learning_rate 0.0123", flags)
    assert "--seed 7 " in row["flags"]
    succeed(script, "--device cpu --csv again.csv", row["flags"])
    assert result(rows("again.csv")[0]) == result(row)
    assert Path("again.csv").read_text().startswith(COLUMNS + "\n")

@each_script
def test_a_csv_row_says_what_was_run_and_what_came_out(script):
    row = row_of(script, "--dropout 0.3")
    curve = [point.split(":") for point in row["curve"].split()]
    best_iter, _, best_val_loss = min(curve, key=lambda point: float(point[2]))
    assert [step for step, _, _ in curve] == ["0", "2", "4"] and row["best_iter"] == best_iter
    losses = [f"{float(row[name]):.4f}" for name in ("train_loss", "val_loss", "best_val_loss")]
    assert losses == [*curve[-1][1:], best_val_loss]
    assert row["experiment"] == script.__name__ and row["data_crc32"] == str(zlib.crc32(TEXT.encode()))
    assert row["pe_type"] == ("sinpe" if script is gpt_v3 else "learned")
    assert (row["published_val_loss"] == "") == (script is not gpt_v3)
    assert row["params"] == str(sum(p.numel() for p in train(script).parameters()))

@each_script
def test_once_does_nothing_if_the_csv_has_the_row(script):
    row_of(script, "--once")
    out = succeed(script, QUICK, "--csv r.csv --once")
    assert out == "nothing to do: r.csv has the row of this run\n" and len(rows()) == 1
    row_of(script, "--once --seed 2")
    Path("input.txt").write_text(TEXT[1:])  # another text of the same name
    row_of(script, "--once")
    row_of(script)
    assert len(rows()) == 4

fork = multiprocessing.get_context("fork") if os.name == "posix" else None  # torch is imported only once

def in_children(function, *arguments):
    """Call a function in child processes at once, one for each of the arguments."""
    children = [fork.Process(target=function, args=(argument,)) for argument in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0

def test_parallel_writers_tear_no_csv_row_and_write_one_header():
    def write(n):
        for i in range(50):
            gpt.append_row("r.csv", {"experiment": n, "n_embd": i, "data": 'a "quoted", path'})

    in_children(write, 0, 1, 2, 3)
    found = sorted((row["experiment"], int(row["n_embd"]), row["data"]) for row in rows())
    assert found == [(str(n), i, 'a "quoted", path') for n in range(4) for i in range(50)]

@each_script
@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk_costs_no_result_and_the_next_csv_row_is_whole(script, room):
    row = row_of(script)
    size = os.path.getsize("r.csv") + room

    def with_a_full_disk(loss):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        refuse(script, QUICK, "--csv r.csv", says=f"--csv r.csv / {loss}", status=1)

    in_children(with_a_full_disk, row["val_loss"])
    assert result(row_of(script)) == result(row)

# --- Stops and faults ------------------------------------------------------------------------------------
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

@pytest.fixture
def send_signal(monkeypatch):
    """send_signal(script, number, batch): this process gets a signal when a script reads that batch."""
    def arrange(script, number, batch):
        get_batch = script.get_batch
        count = itertools.count(1)

        def get_batch_and_signal(*args):
            if next(count) == batch:
                os.kill(os.getpid(), number)
            return get_batch(*args)
        monkeypatch.setattr(script, "get_batch", get_batch_and_signal)
    return arrange

@each_script
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_with_one_line_its_status_and_no_csv_row(script, number, send_signal):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    send_signal(script, number, batch=4 + 7)  # the seventh iteration, after an evaluation of both splits
    flags = f"{QUICK} --max_iters 20 --eval_interval 20 --csv r.csv"
    error = refuse(script, flags, status=128 + number)
    assert error == f"{script.__name__}.py: stopped at step 7\n"
    assert rows() == []
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    succeed(script, flags)

@each_script
def test_train_returns_the_model_that_a_signal_leaves_also_during_an_evaluation(script, send_signal, capsys):
    config = script.parse_args(split(QUICK, "--eval_iters 100000"))  # which would take minutes
    send_signal(script, signal.SIGINT, batch=5)
    model, chars = script.train(config)
    assert capsys.readouterr().err.endswith(": stopped at step 0\n")
    assert not model.training and chars == CHARS
    assert model.generate(torch.zeros(2, 1, dtype=torch.long), 5).shape == (2, 6)

def in_notebook(*cells):
    """What cells print in a real Jupyter kernel, which can import the scripts."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    path = f"import sys; sys.path.append({str(ROOT)!r})\n"
    cells = [nbformat.v4.new_code_cell(path + source) for source in cells]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": os.getcwd()}}).execute()
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]

INTERRUPT = """
import _thread, signal, threading, time
before = signal.getsignal(signal.SIGINT)
def interrupt_the_training():
    while signal.getsignal(signal.SIGINT) == before:
        time.sleep(0.1)
    _thread.interrupt_main()
threading.Thread(target=interrupt_the_training).start()
"""

@slow
def test_an_interrupted_cell_of_a_notebook_leaves_the_model_and_its_characters():
    """A file pasted as a whole, and one of which train() is called."""
    pasted = INTERRUPT + Path(gpt.__file__).read_text()
    v3 = f"import gpt_v3; config = gpt_v3.parse_args({split(QUICK, '--max_iters 1000000')})"
    called = f"{v3}\n{INTERRUPT}\nmodel, chars = gpt_v3.train(config)"
    use = "print(type(model), len(chars), model.generate(torch.tensor([[0]]), 3).shape)"
    one, used, two, used_again = in_notebook(pasted, use, called, use)
    assert "stopped at step" in one and "stopped at step" in two
    assert used == f"<class '__main__.GPT'> {len(CHARS)} torch.Size([1, 4])\n"
    assert used_again == used.replace("__main__", "gpt_v3")

@slow
def test_ctrl_c_while_cpp_is_compiled_ends_the_run(monkeypatch):
    """A terminal sends it to the C++ compiler, too, which fails."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.path.abspath("cache"))
    process = start(gpt.__file__, QUICK, "--n_head 1 --n_layer 1 --compile", start_new_session=True)
    ps = ["ps", "-o", "comm", "-s", str(process.pid)]
    wait_for(lambda: b"cc1plus" in subprocess.run(ps, capture_output=True).stdout, process)
    os.killpg(process.pid, signal.SIGINT)
    status, out, err = finish(process)
    assert (status, err) == (130, "gpt.py: stopped by Ctrl-C\n")

@each_script
def test_a_loss_that_is_not_finite_ends_the_run_without_a_csv_row(script, monkeypatch):
    monkeypatch.setattr(script, "estimate_loss", lambda *args, **options: math.nan)
    refuse(script, QUICK, "--csv r.csv", says="step 0 / --learning_rate", status=1)
    assert rows() == []

@each_script
def test_a_character_that_the_terminal_cannot_show_is_a_question_mark(script, monkeypatch):
    Path("input.txt").write_text("Anaïs\nBüşra\nChloé\nOmar\nZoë\n" * 99, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [script.__file__, *split(QUICK, "--max_new_tokens 200")])
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as with PYTHONIOENCODING=ascii
    with redirect_stdout(out):
        script.main()
    assert b"?" in out.buffer.getvalue().split(b"final: ")[1]

@each_script
def test_neither_a_byte_order_mark_nor_line_ends_change_a_run(script):
    text = TEXT.replace("a", "à").encode()
    results = []
    for content in (text, b"\xef\xbb\xbf" + text, text.replace(b"\n", b"\r\n")):
        Path("input.txt").write_bytes(content)
        results.append(result(row_of(script)))
    assert results[0] == results[1] == results[2]

# --- Saved runs ------------------------------------------------------------------------------------------
RUN = f"""{QUICK} --max_iters 40 --eval_interval 7 --dropout 0.3 --learning_rate 1e-2 --warmup_iters 5
    --min_lr 1e-4 --max_new_tokens 0 --optimizer muon --attn mla --mlp vq --pe_at qk"""

def assert_same_run(a, b):
    """Two runs must have ended in the same weights, moments, random states and losses, bit for bit."""
    for end in (".pt", ".pt.best"):
        states = [load(a + end), load(b + end)]
        for state in states:
            for name in ("flags", "chars", "train_s"):
                del state[name]
            state["optimizers"] = [optimizer["state"] for optimizer in state["optimizers"]]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    assert result(rows(f"{a}.csv")[-1]) == result(rows(f"{b}.csv")[-1])

@slow
def test_a_run_killed_at_random_moments_and_resumed_equals_one_that_was_not():
    long = f"{RUN} --max_iters 150 --eval_interval 4"
    succeed(gpt_v3, long, "--save whole.pt --csv whole.csv")
    moments = random.Random(0)
    kills = 0
    flags = f"{long} --save cut.pt --csv cut.csv"
    while True:
        child = fork.Process(target=succeed, args=(gpt_v3, flags))
        child.start()
        child.join(moments.uniform(0, 0.2 + kills / 50))
        child.kill()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        if os.path.exists("cut.pt"):
            flags = "--resume cut.pt --csv cut.csv --device cpu"
    assert kills > 2
    assert_same_run("cut", "whole")

@pytest.mark.parametrize("number,batch,step", [
    (signal.SIGINT, 3, 0), (signal.SIGTERM, 20, 12), (signal.SIGHUP, 40, 24)])  # in or between evaluations
def test_a_run_stopped_by_a_signal_says_how_to_resume_and_equals_one_that_was_not(
        number, batch, step, send_signal):
    succeed(gpt_v3, RUN, "--save whole.pt --csv whole.csv")
    send_signal(gpt_v3, number, batch)
    error = refuse(gpt_v3, RUN, "--save cut.pt --csv cut.csv", status=128 + number)
    assert error == f"gpt_v3.py: stopped at step {step}; --resume cut.pt continues it\n"
    assert rows("cut.csv") == []
    assert "--tiny" not in succeed(gpt_v3, "--resume cut.pt --csv cut.csv --device cpu")
    assert_same_run("cut", "whole")

def test_best_holds_the_step_with_the_lowest_val_loss():
    Path("input.txt").write_text(TEXT[:900])
    row = row_of(gpt_v3, "--max_iters 300 --eval_interval 20 --learning_rate 1e-2 --dropout 0 --pe randn "
                 "--dtype float32 --save run.pt")
    assert 0 < load("run.pt.best")["step"] == int(row["best_iter"]) < load("run.pt")["step"] == 300
    config = gpt_v3.parse_args(split(QUICK, "--dtype float32"))
    for path, loss in (("run.pt", "val_loss"), ("run.pt.best", "best_val_loss")):
        model, chars = gpt_v3.load(path)
        assert not model.training
        val_data = torch.tensor([chars.index(char) for char in TEXT[810:900]])
        assert gpt_v3.estimate_loss(model, val_data, config) == pytest.approx(float(row[loss]), abs=1e-5)

def test_a_save_that_finds_no_room_costs_a_warning_and_keeps_the_last_one():
    succeed(gpt_v3, RUN, "--save whole.pt --csv whole.csv")
    get_batch = gpt_v3.get_batch
    batches = itertools.count()

    def get_batch_and_fill_the_disk(*args):
        if next(batches) == 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        return get_batch(*args)

    def work(flags):
        gpt_v3.get_batch = get_batch_and_fill_the_disk
        status, out, err = run(gpt_v3, flags)
        assert status == 0 and "final: " in out
        assert re.fullmatch("(gpt_v3.py: warning: --save cut.pt.*\n){5,}", err)

    in_children(work, f"{RUN} --save cut.pt")
    assert load("cut.pt")["step"] == 7
    succeed(gpt_v3, "--resume cut.pt --csv cut.csv --device cpu")
    assert_same_run("cut", "whole")

@pytest.mark.parametrize("flags,words", cases("""
    --save run.pt                       --save run.pt / already exists; --resume run.pt
    --resume run.pt --max_iters 3       run.pt / step 4 / --max_iters 3
    --resume run.pt --optimizer muon    run.pt / adamw / --optimizer muon
    --resume run.pt --data other.txt    run.pt / --data other.txt / --init_from
    --resume run.pt --n_embd 32         run.pt / --n_embd 32 / 16
    --resume run.pt --pe rope           run.pt / --pe rope / sinpe
    --generate run.pt --n_layer 3       run.pt / --n_layer 3 / 2
    --generate run.pt --mlp vq          run.pt / --mlp vq / gelu
    --init_from run.pt --block_size 9   run.pt / --block_size 9 / 8"""))
def test_flags_that_do_not_fit_a_saved_run_are_named_and_it_is_kept(saved, flags, words):
    Path("other.txt").write_text(TEXT[1:])
    before = files()
    refuse(gpt_v3, flags, "--device cpu", says=words)
    assert files() == before

@pytest.mark.parametrize("flags,changes", [
    ("--max_iters 4", False), ("--max_iters 6", False), ("--learning_rate 1e-2", True),
    ("--warmup_iters 3", True), ("--min_lr 1e-4 --max_iters 6", True)])
def test_resume_keeps_the_flags_of_the_run_and_says_when_the_schedule_changes(saved, flags, changes):
    out = succeed(gpt_v3, "--resume run.pt --tiny --csv r.csv --device cpu", flags)
    assert ("learning rate now follows" in out) == changes
    assert rows()[0]["n_embd"] == "16"
    steps = re.findall(r"\b(\d):\d", rows()[0]["curve"])
    assert steps == (["0", "2", "4", "6"] if "6" in flags else ["0", "2", "4"])

class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)

NO_RUN = "not a file that --save wrote"

def test_files_that_are_not_saved_runs_are_refused_and_not_executed(saved):
    state = load("run.pt")
    more = state["flags"] | {"frob": 1}
    wide = state["flags"] | {"n_embd": 32}
    for thing, reason in (
            ([state], NO_RUN), (Evil(), NO_RUN), (state | {"flags": Evil()}, NO_RUN), ({"model": 1}, NO_RUN),
            (state | {"flags": more}, "saved by a version with different flags"),
            (state | {"flags": wide}, "its weights do not fit its flags"),
            (state | {"optimizers": []}, "its optimizer or random state does not fit")):
        torch.save(thing, "bad.pt")
        refuse(gpt_v3, "--resume bad.pt --device cpu", says=f"bad.pt: {reason}")
    assert not os.path.exists("executed")

def test_half_a_saved_run_is_refused(saved):
    whole = Path("run.pt").read_bytes()
    Path("half.pt").write_bytes(whole[:len(whole) // 2])
    refuse(gpt_v3, "--generate half.pt --device cpu", says=f"half.pt: {NO_RUN}")

# --- Finetuning and other data ---------------------------------------------------------------------------
def test_finetuning_begins_with_the_weights_and_characters_of_a_saved_run_and_a_fresh_optimizer(saved):
    Path("backwards.txt").write_text(TEXT[::-1])
    finetune = "--init_from run.pt --data backwards.txt --batch_size 4 --max_iters 3 --eval_iters 2"
    out = succeed(gpt_v3, finetune, "--device cpu --save new.pt --csv r.csv --max_new_tokens 0")
    model, chars = gpt_v3.load("run.pt")
    val_data = torch.tensor([chars.index(char) for char in TEXT[1999::-1]])
    loss = gpt_v3.estimate_loss(model, val_data, gpt_v3.parse_args(split(QUICK)))
    assert re.search(rf"\nstep 0: .* val loss {loss:.4f}\n", out)
    assert load("new.pt")["chars"] == chars and load("new.pt")["step"] == 3
    succeed(gpt_v3, "--resume new.pt --max_iters 5 --csv r.csv --device cpu --max_new_tokens 0")
    assert all("--init_from run.pt" in row["flags"] for row in rows())
    Path("backwards.txt").write_text(TEXT + "é€")
    refuse(gpt_v3, finetune, "--device cpu", says="--data backwards.txt / é / €")

def write_folder(name, train, val, meta=None):
    """Write a folder as nanoGPT prepares it."""
    Path(name).mkdir(exist_ok=True)
    Path(name, "train.bin").write_bytes(train)
    Path(name, "val.bin").write_bytes(val)
    if meta:
        Path(name, "meta.pkl").write_bytes(pickle.dumps(meta))

def uint16(text):
    return b"".join(CHARS.index(char).to_bytes(2, "little") for char in text)

def test_a_folder_of_nanogpt_trains_as_its_text_does():
    meta = {"vocab_size": len(CHARS), "itos": dict(enumerate(CHARS)), "stoi": {}}
    write_folder("chars", uint16(TEXT[:18000]), uint16(TEXT[18000:]), meta)
    text = succeed(gpt_v3, QUICK)
    folder = succeed(gpt_v3, QUICK, "--csv r.csv --data chars/")
    assert text.split("final: ")[1] == folder.split("final: ")[1]
    assert (rows()[0]["data"], rows()[0]["data_crc32"]) == ("chars", str(zlib.crc32(uint16(TEXT))))

def test_a_folder_without_characters_has_the_tokens_of_gpt_2(monkeypatch):
    write_folder("gpt2", uint16(TEXT[:1000]), b"\x50\xc4" * 100)  # 50256 is the last of them
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # not installed
    _, out, err = run(gpt_v3, QUICK, "--data gpt2 --save gpt2.pt --max_iters 1 --max_new_tokens 5")
    assert re.search(r"\n0 (\d+ ){5}\n$", out)
    assert "pip install tiktoken" in err and err.count("\n") == 1
    generate = "--generate gpt2.pt --max_new_tokens 3 --device cpu --prompt"
    _, out, _ = run(gpt_v3, generate, "'7 50256'")
    assert re.fullmatch(r"7 50256 (\d+ ){3}\n", out)
    tokenizer = types.SimpleNamespace(  # its words are numbers
        encode=lambda text, **options: [int(word) for word in text.split()],
        decode=lambda ids: " ".join(str(i) for i in ids))
    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=lambda name: tokenizer))
    out = succeed(gpt_v3, generate, "'7 50256 50257'")  # 50257 only pads the vocabulary
    assert re.fullmatch(r"7 50256( \d+){3}\n", out)

ZEROS = bytes(98)
@pytest.mark.parametrize("train,val,meta,words", [
    (ZEROS[1:], ZEROS, None, "train.bin / odd"),
    (ZEROS, b"", None, "val.bin"),
    (ZEROS, ZEROS[:16], None, "val.bin / --block_size 8"),
    (b"\1\0\0\0" * 49, ZEROS, None, "train.bin / uint32"),
    (b"\xff" * 98, ZEROS, None, "train.bin / 65535"),
    (b"\2\0" * 49, ZEROS, {"itos": {0: "a", 1: "b"}}, "id 2 / ends at 1"),
    (ZEROS, ZEROS, {"itos": print}, "meta.pkl / builtins.print"),
    (ZEROS, ZEROS, {"stoi": {"a": 0}}, "meta.pkl / itos")])
def test_a_damaged_or_hostile_folder_is_refused(train, val, meta, words):
    write_folder("f", train, val, meta)
    refuse(gpt_v3, QUICK, "--data f", says=f"--data f / {words}")

@slow
def test_a_folder_of_1_gb_is_not_read_into_memory():
    write_folder("big", b"", b"", {"itos": {0: "a", 1: "b"}})
    os.truncate("big/train.bin", 2**30)  # sparse: zeros that take no room
    os.truncate("big/val.bin", 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(gpt_v3, "--data big --max_iters 100 --batch_size 32")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB

# --- Several processes -----------------------------------------------------------------------------------
DDP = f"""{QUICK} --max_iters 40 --eval_interval 7 --dropout 0 --dtype float32 --batch_size 8 --grad_clip 0.5
    --learning_rate 1e-2 --min_lr 1e-4 --save"""

def torchrun(*flags):
    return start("-m torch.distributed.run --standalone --nproc_per_node=2", ROOT / "gpt_v3.py", *flags)

@slow
def test_two_processes_of_ddp_train_like_one():
    status, out, err = finish(torchrun(DDP, "two.pt --grad_accum 2 --csv r.csv"))
    assert status == 0 and "Warning" not in err and out.count("final: ") == len(rows()) == 1
    succeed(gpt_v3, DDP, "one.pt")
    one, two = [dict(load(path)["model"]) for path in ("one.pt", "two.pt")]
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)

@slow
def test_ddp_stopped_by_a_signal_is_saved_once_and_resumed_by_one_process():
    process = torchrun(DDP, "cut.pt --max_iters 1000000 --eval_interval 500000 --csv r.csv")
    wait_for(lambda: process.stdout.readline().startswith("step 10 "), process)
    process.terminate()
    status, out, err = finish(process)
    step = load("cut.pt")["step"]
    assert status != 0 and step > 10 and rows() == []
    assert err.count(f"stopped at step {step}; --resume cut.pt continues it") == err.count("stopped at") == 1
    succeed(gpt_v3, "--resume cut.pt --csv r.csv --device cpu --eval_interval 100 --max_iters", step + 3)
    assert load("cut.pt")["step"] == step + 3 and len(rows()) == 1

# --- The sweep -------------------------------------------------------------------------------------------
def sweep(*flags, **variables):
    """Start sweep.sh in a process group of its own, with the Python that runs the tests."""
    env = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    env["PATH"] = f"{os.getcwd()}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(["bash", ROOT / "sweep.sh", *split(*flags)], env=env | variables, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def write_program(name, text):
    """Write a program that a sweep finds before others of its name."""
    Path(name).write_text(f"#!/bin/sh\n{text}\n")
    Path(name).chmod(0o755)

TRIFLE = """--n_layer 1 --n_head 2 --n_embd 16 --batch_size 2 --block_size 8 --max_iters 2 --eval_interval 2
    --eval_iters 1 --device cpu --data input.txt"""

@pytest.mark.parametrize("flags,widths,depths,rest", [
    ("", ["384", "768"], ["6", "8", "12"], ""),
    ("--laptop", ["96", "192"], ["3", "4", "6"], "laptop.txt --batch_size 8 --block_size 64 --max_iters 5000 "
     "--eval_interval 500 --eval_iters 60 --learning_rate 5e-4 --dropout 0.06")])
def test_the_sweep_is_the_56_runs_of_the_experiment(flags, widths, depths, rest):
    status, out, err = finish(sweep("--dry-run --csv new.csv", flags, "-- --seed 2"))
    assert (status, err) == (0, "") and not os.path.exists("new.csv")
    pattern = r"(gpt\S*)\.py (?:--pe (\w+) )?--n_embd (\d+) --n_head (\d+) --n_layer (\d+) --data"
    runs = re.findall(pattern, out)
    small = ("", widths[0], "6", depths[0])
    grid = itertools.product(["gpt_v3"], ["randn", "sinpe", "rope"], widths, ["6", "8", "12"], depths)
    assert sorted(runs) == sorted([("gpt", *small), ("gpt_v2", *small), *grid])
    for line in out.splitlines():
        assert rest in line and "--seed 2 --csv new.csv --once" in line

def test_a_sweep_can_be_a_part_of_itself_or_one_task_of_slurm():
    assert finish(sweep("--dry-run --only 'n_embd 384'"))[1].count("\n") == 29
    task = finish(sweep("--dry-run", SLURM_ARRAY_TASK_ID="55"))[1]
    assert task.count("\n") == 1 and "--pe rope --n_embd 768 --n_head 12 --n_layer 12" in task
    assert finish(sweep("--help"))[1].startswith("usage: ")

@pytest.mark.parametrize("visible,used", [({}, "012"), ({"CUDA_VISIBLE_DEVICES": "4,7"}, "47")])
def test_the_runs_of_a_sweep_take_turns_on_the_gpus(visible, used):
    write_program("nvidia-smi", r"printf 'GPU 0\nGPU 1\nGPU 2\n'")
    write_program("python3", "echo $CUDA_VISIBLE_DEVICES >> used; sleep 0.3")
    status, _, err = finish(sweep("--csv r.csv --only '384 --n_head 6'", **visible))
    assert (status, err) == (0, "") and set(Path("used").read_text().split()) == set(used)

@slow
@pytest.mark.parametrize("flags,message", [
    ("--frobnicate", "usage: "), ("--csv", "usage: "), ("--only nothing", "error: there is no such run"),
    ("--csv r.csv -- --data no.txt", "error: --data no.txt: "),
    ("--csv r.csv -- --frobnicate", "error: unrecognized arguments: --frobnicate")])
def test_what_is_wrong_with_a_sweep_is_said_once(flags, message):
    status, out, err = finish(sweep(flags))
    assert status == 2 and err.count(message) == 1 and "final" not in out
    assert message == "usage: " or err.count("\n") == 1

@slow
def test_a_sweep_runs_what_its_csv_does_not_have():
    flags = f"--only 'gpt_v2\\|randn.*n_head 6 --n_layer 6' --csv r.csv -- {TRIFLE}"
    status, out, err = finish(sweep(flags, JOBS="1"))
    assert (status, err) == (0, "") and len(rows()) == 2  # at these sizes, two of the three runs are one
    assert out.count("start: ") == 3 and out.count(": final: train loss ") == 2
    status, out, err = finish(sweep(flags, JOBS="2"))
    assert out.count("nothing to do") == 3

@slow
def test_a_sweep_goes_on_when_a_run_fails_and_says_so_at_the_end():
    write_program("python3", f"""case $1 in *gpt.py) echo broken >&2; exit 7;; esac
        exec {sys.executable} "$@" """)
    status, out, err = finish(sweep("--only 'gpt.py\\|gpt_v2' --csv r.csv --", TRIFLE))
    assert (status, err) == (1, "broken\n1 runs failed; rerun to continue\n")
    assert [row["experiment"] for row in rows()] == ["gpt_v2"] and out.count("start: ") == 2

@slow
def test_ctrl_c_ends_a_sweep_and_its_runs_and_what_was_saved_is_resumed(folder):
    flags = f"--only 'rope.*768.*12.*12' --csv r.csv -- {TRIFLE} --max_iters 1000000 --eval_interval 1000000"
    process = sweep(flags, SAVE="kept")
    wait_for(lambda: list(folder.glob("kept/*.pt")), process)
    os.killpg(process.pid, signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130 and "Traceback" not in err and "continues it" in err
    assert rows() == []
    left = subprocess.run(["pgrep", "-r", "R,S,D", "-g", str(process.pid)], capture_output=True)
    assert left.stdout == b""
    assert "--resume kept/" in finish(sweep("--dry-run", flags, SAVE="kept"))[1]

# --- The report ------------------------------------------------------------------------------------------
@pytest.fixture
def report(folder):
    """results/report.py in a folder with the published losses, and with a page of all its tables."""
    Path("results").mkdir()
    for name in ("report.py", "seed.csv", "choices.csv"):
        shutil.copy(ROOT / "results" / name, "results")
    names = "summary prediction findings comparisons runs choices".split()
    blocks = [f"<!-- report {name} -->\nold\n<!-- /report -->\n" for name in names]
    Path("results/README.md").write_text("top\n" + "".join(blocks) + "end\n")
    spec = importlib.util.spec_from_file_location("report", folder / "results/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def write_csv(path, change=float, old="", new="", **cells):
    """Append to a CSV the published runs at the laptop's size, with changed losses, flags and cells."""
    gpt.append_row(path)
    for row in rows(ROOT / "results/seed.csv"):
        for name in ("train_loss", "val_loss"):
            if row[name]:
                row[name] = change(float(row[name]))
        row["best_val_loss"] = row["val_loss"]
        row["n_embd"] = int(row["n_embd"]) // 4
        row["n_layer"] = int(row["n_layer"]) // 2
        row["curve"] = "0:4.2:4.2 500:2.5:2.6 1000:2.0:2.4 1500:1.5:2.7"
        row["flags"] = row["flags"].replace("--block_size 256", "--block_size 64").replace(old, new)
        gpt.append_row(path, row | cells)

def table(report, name, path):
    """A table that report.py prints for a CSV: {first cell of a line: the others}."""
    text = succeed(report, path).split(f"## {name}\n")[1].split("\n## ")[0]
    lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}

def test_the_committed_tables_and_figures_are_what_the_csvs_give():
    assert "<!-- report findings -->" in (ROOT / "results/README.md").read_text()
    assert finish(start(ROOT / "results/report.py", "--check")) == (0, "", "")

@slow
def test_a_report_fills_the_page_and_check_finds_what_is_out_of_date(report):
    write_csv("results/laptop.csv")
    succeed(report)
    page = Path("results/README.md")
    text = page.read_text()
    assert re.fullmatch("(?s)top\n.*45 of 56 runs.*--attn mla.*end\n", text) and "old" not in text
    assert succeed(report, "--check") == ""
    page.write_text(text.replace("reproduced", "true"))
    refuse(report, "--check", says="README.md is out of date", status=1)
    page.write_text(text)
    write_csv("results/laptop.csv", curve="0:4:4 9:3:2")  # which no table shows
    refuse(report, "--check", says="losses.png is out of date", status=1)

WIDE = "n_embd 768 has the lowest train loss"

@slow
def test_a_report_of_the_same_losses_reproduces_every_finding_and_of_turned_ones_hardly_any(report):
    write_csv("same.csv")
    found = table(report, "findings", "same.csv")
    assert found[WIDE] == ["16 of 16, +0.545", "16 of 16, +0.545", "reproduced"]
    verdicts = [line[-1] for line in found.values() if "of" in line[0]]
    assert len(verdicts) == 14 and set(verdicts) == {"reproduced", "only 2 pairs"}
    assert table(report, "prediction", "same.csv")["all"] == ["41", "1.00", "44", "1.00"]
    write_csv("turned.csv", lambda loss: 4 - loss)
    assert table(report, "prediction", "turned.csv")["all"] == ["41", "-1.00", "44", "-1.00"]
    assert table(report, "findings", "turned.csv")[WIDE][1:] == ["0 of 16, -0.545", "not reproduced"]
    write_csv("short.csv", old="--max_iters 5000", new="--max_iters 50")
    assert table(report, "findings", "short.csv")[WIDE][-1] == "only 50 iterations"

@slow
def test_a_report_knows_the_spread_of_seeds(report):
    """Of these two seeds, only the val losses differ: every published one is above 1.3, no train loss is."""
    for seed in (1, 2):
        change = lambda loss: loss + seed / 5 if loss > 1.3 else loss
        write_csv("two.csv", change, old="--seed 1337", new=f"--seed {seed}")
    found = table(report, "findings", "two.csv")
    assert found[WIDE][-1] == "reproduced"
    assert found["pe_type rope has the lowest train loss, n_embd 768"][-1] == "reproduced"
    assert found["pe_type sinpe has the lowest val loss"][-1] == "within the spread of seeds"
    text = succeed(report, "two.csv")
    assert re.search(r"sinpe .*\| 384 \(96\) .* 8 \| 6 \(3\) .*\| 1\.806 ± 0\.141 ", text)

def test_a_report_of_rows_that_differ_in_other_flags_is_a_table_of_them(report):
    row = rows(ROOT / "results/choices.csv")[0] | {"pe_type": "nope"}
    for flags, loss in (("--dropout 0.1 --seed 1", 1.5), ("--dropout 0.1 --seed 2", 1.6),
                        ("--dropout 0.1 --seed 3", 1.55), ("--dropout 0.2 --seed 1", 1.4)):
        gpt.append_row("mine.csv", row | {"val_loss": loss, "flags": flags})
    found = table(report, "choices", "mine.csv")
    assert found["nothing"][:3] == ["3", "1.550 ± 0.050", "+0.000"]
    assert found["`--dropout 0.2`"][:3] == ["1", "1.400", "-0.150"]

@slow
def test_a_report_of_a_part_of_a_sweep_and_of_another_encoding_has_its_tables_and_figures(report):
    write_csv("mine.csv", pe_type="nope", n_embd=64)
    assert "nope" in succeed(report, "mine.csv")
    assert os.path.exists("mine_losses.png") and os.path.exists("mine_curves.png")
    Path("one.csv").write_text("".join(Path("mine.csv").read_text().splitlines(keepends=True)[:2]))
    assert "1 rows" in succeed(report, "one.csv")
    piped = f"{sys.executable} results/report.py mine.csv | head -n 1"
    assert subprocess.run(piped, shell=True, capture_output=True).stderr == b""

@pytest.mark.parametrize("old,new,message", [
    (r"\n\Z", "", "the last line is cut off"), (r":2\.7\n", "", "line 2 is cut off"),
    (r"2\.7\n", "2.7", "line 2 is cut off"),
    (",96,", ",wide,", "invalid literal for int() with base 10: 'wide'"),
    ("val_loss", "loss", "the column val_loss is missing"),
    ("experiment", "x", "it is not a CSV of the scripts"), ("(?s).*", "x", "it is not a CSV of the scripts")])
def test_a_report_says_what_is_wrong_with_a_csv(report, old, new, message):
    write_csv("mine.csv")
    Path("mine.csv").write_text(re.sub(old, new, Path("mine.csv").read_text(), count=1))
    refuse(report, "mine.csv", says=f"mine.csv: {message}")
    refuse(report, "no.csv", says="no.csv / No such file")

# --- The benchmark ---------------------------------------------------------------------------------------
SMALL = "--T 16 --n_head 2 --n_embd 32 --batch_size 2 --n_layer 2 --rounds 1 --csv a.csv"

@pytest.mark.parametrize("flags,words", cases("""
    --T 256 x               x
    --T 1                   --T must be at least 2
    --T                     --T
    --n_head 6 5            --n_head 5
    --dtype float16         float16
    --dropout 1             --dropout: must be
    --rounds 0              --rounds
    --batch_size 0          --batch_size: must be
    --device tpu            tpu
    --csv no/a.csv          no/a.csv
    --csv .                 . / directory
    --plot no/a.png         no/a.png
    --head 6                --head
    --step --data no.txt    no.txt
    --step --T 16 5000      5000"""))
def test_bad_flags_of_the_benchmark_get_one_line_before_anything_is_measured(flags, words):
    before = files()
    refuse(bench, "--device cpu", flags, says=words)
    assert files() == before

def no_gradient(*args):
    return bench.manual(*args).detach()

WRONG = {
    "not causal": lambda q, k, v, mask, p: bench.manual(q, k, v, mask | True, p),
    "drops 1/8, not 1/5": lambda q, k, v, mask, p: bench.manual(q, k, v, mask, min(p, 1 / 8)),
    "no gradient of v": lambda q, k, v, mask, p: bench.manual(q, k, v.detach(), mask, p) + 0 * v,
    "gradients of another mask": lambda *args: bench.manual(*args) + no_gradient(*args) - no_gradient(*args)}

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_of_the_benchmark_tells_wrong_attention_from_right(wrong, dtype):
    torch.manual_seed(0)
    *qkv, grad = torch.randn(4, 2, 6, 128, 64, dtype=dtype)
    mask = torch.tril(torch.ones(128, 128, dtype=torch.bool))
    inputs = [x.requires_grad_() for x in qkv] + [grad, mask, 0.2, True]
    with pytest.raises(ArithmeticError, match="wrong: the error is"):
        bench.check(WRONG[wrong], *inputs)
    assert bench.check(bench.manual, *inputs) < 0.5

@slow
@each_device
@pytest.mark.parametrize("dtype,dropout", [("float32", 0.2), ("bfloat16", 0.0)])
def test_every_contender_of_the_benchmark_that_runs_is_right(device, dtype, dropout):
    flags = split("--batch_size 2 --device", device, "--dtype", dtype, "--dropout", dropout)
    right = {row["contender"] for row in bench.time_attention(flags, 1) if not row["note"]}
    assert {"manual", "manual, compiled", "SDPA math", "SDPA math, bf16 sums"} <= right
    assert ("SDPA flash" in right) == (device == "cuda" or not dropout)
    assert ("Triton, this file" in right) == (device == "cuda" and not dropout)

def test_peak_memory_is_what_a_call_holds_at_most():
    def call():
        torch.empty(3 << 18)  # 3 MiB of floats, freed at once
        return torch.empty(1 << 18), torch.empty(1 << 18)
    assert bench.peak_mib(call, "cpu") == 3

def test_the_benchmark_of_attention_writes_a_table_a_csv_and_a_figure(monkeypatch):
    def large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\n:(")

    contenders = {"manual": bench.manual, "wrong": WRONG["not causal"], "large": large}
    monkeypatch.setattr(bench, "contenders", lambda device: contenders)
    _, out, err = run(bench, SMALL, "--device cpu --T 16 32 --dtype float32 --dropout 0.2 --plot a.png")
    right = [row for row in rows("a.csv") if not row["note"]]
    assert len(rows("a.csv")) == 12 and len(right) == 4
    table = re.findall(r"\| +(\d+) \| (forward.*?) +\| manual +\| +([\d.]+) +\|", out)
    assert table == [(row["block_size"], row["case"], f"{float(row['ms']):.4g}") for row in right]
    for row in right:
        assert float(row["ms_q1"]) <= float(row["ms"]) <= float(row["ms_q3"])
        assert f"manual, {row['case']}: {float(row['ms']):.4g} ms\n" in err  # as soon as it is measured
    assert "* wrong, forward: wrong: the error is" in out
    assert "* large, forward: CUDA out of memory. Tried to allocate 1 TiB\n" in out
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")

@slow
@pytest.mark.parametrize("device,rungs", [("cpu", 4), pytest.param("cuda", 6, marks=on_gpu.marks)])
def test_the_benchmark_times_a_step_on_every_rung_and_compiles_a_graph_per_shape(device, rungs, compile_with):
    if device == "cpu":
        compile_with("eager")
    _, out, _ = run(bench, SMALL, "--step --n_layer 3 --T 16 32 --plot s.png --device", device)
    found = [(row["case"], row["contender"]) for row in rows("a.csv") if float(row["ms"]) > 0]
    assert found == 2 * list(itertools.product([*bench.RUNGS][:rungs], ("gpt", "gpt_v2", "gpt_v3")))
    assert_graphs(2 * 3 * (rungs - 2))  # shapes, scripts, compiled rungs
    assert "first_step_s" in out and os.path.exists("s.png")

@each_script
def test_the_step_that_is_timed_is_the_script_s(script):
    config = script.parse_args(split(QUICK))
    torch.manual_seed(config.seed)
    model, step = bench.training_step(script, config, fused=True)
    for _ in range(config.max_iters):
        step()
    torch.testing.assert_close(dict(model.state_dict()), dict(train(script).state_dict()))

INTERPRET = """
import bench, torch, triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder as Builder
dot = Builder.create_dot  # of bfloat16, it multiplies the bits as integers
Builder.create_dot = lambda self, a, b, *rest: dot(
    self, self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32), *rest)
for B, H, T, hs in (1, 3, 1, 16), (2, 1, 17, 32), (1, 2, 129, 48), (2, 1, 256, 128):
    q, k, v = torch.randn(B, T, 3, H, hs, dtype=torch.bfloat16).mul(2).permute(2, 0, 3, 1, 4)
    mask = torch.tril(torch.ones(T, T, dtype=torch.bool))
    print(bench.check(bench.triton_flash, q, k, v, q, mask, 0.0, False))"""

@slow
def test_the_triton_kernel_is_attention_in_triton_s_interpreter():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    status, out, err = finish(start("-c", shlex.quote(INTERPRET), env=env))
    assert status == 0 and len(out.split()) == 4, err

@slow
@pytest.mark.parametrize("capability,shared", [(90, 232448), (89, 101376)])
@pytest.mark.parametrize("hs,num_warps", [(64, 4), (128, 8)])
def test_the_triton_kernel_compiles_for_a_gpu_and_fits_its_shared_memory(capability, shared, hs, num_warps):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    constants = dict(hs=hs, BLOCK_D=hs, BLOCK_M=128, BLOCK_N=64)
    types = dict.fromkeys(("Q", "K", "V", "OUT"), "*bf16") | dict.fromkeys(constants, "constexpr")
    types["scale"] = "fp32"
    signature = {name: types.get(name, "i32") for name in bench.flash_kernel.arg_names}
    source = ASTSource(bench.flash_kernel, signature, constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                            options=dict(num_warps=num_warps, num_stages=2))
    assert kernel.asm["cubin"] and kernel.metadata.shared <= shared

# --- The README ------------------------------------------------------------------------------------------
def commands_of_the_readme():
    """The commands in the code blocks of the README, as (script, flags)."""
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ").replace("$T", "512")
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.M | re.S)
    pattern = r"(?:python3?|bash|sbatch.*|torchrun.*|uv run) (\S+\.(?:py|sh))([^|&#;\n]*)"
    return re.findall(pattern, "".join(blocks))

@pytest.mark.parametrize("name,flags", commands_of_the_readme())
def test_a_command_of_the_readme_is_understood(name, flags, saved):
    assert (ROOT / name).exists()
    flags = flags.replace("--device cuda", "").replace("--save run.pt", "--save new.pt")
    if name == "sweep.sh":
        flags, _, rest = flags.partition(" -- ")
        assert finish(sweep("--dry-run", flags))[0] == 0
        gpt_v3.parse_args(split(rest))
    for script in [*SCRIPTS, bench]:
        if name == f"{script.__name__}.py":
            script.parse_args(split(flags))

@slow
def test_the_python_of_the_readme_runs_in_a_notebook():
    code, = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    text, = in_notebook(code.replace("--max_iters 200", "--max_iters 20 --eval_iters 1"))
    assert "final: train loss" in text and re.search(r"\nR(.|\n){100}\n\Z", text)
