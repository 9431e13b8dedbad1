"""Tests of the scripts, the sweep, the report and the benchmark.

    python -m pytest                  all of them, three minutes on two cores
    python -m pytest -m "not slow"    the quick ones
"""
import contextlib, csv, difflib, functools, importlib.util, io, itertools, math, multiprocessing, os, pickle
import random, re, resource, shlex, shutil, signal, subprocess, sys, termios, threading, time, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what is tested is too small for two
import hypothesis, pytest, torch
from hypothesis import strategies as some
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bench, gpt, gpt_v2, gpt_v3

ROOT = Path(__file__).parent
TEXT = (ROOT / "input.txt").read_text()[:20000]
SCRIPTS = [gpt, gpt_v2, gpt_v3]
ENCODINGS = list(itertools.product(("randn", "sinpe", "rope"), ("input", "qk")))
KINDS = list(itertools.product(("mha", "mqa", "gqa", "mla"), ("gelu", "vq")))
QUICK = """--batch_size 4 --block_size 8 --n_embd 16 --n_head 2 --n_layer 2 --max_iters 4 --eval_interval 2
    --eval_iters 2 --max_new_tokens 20 --device cpu"""  # a run of a moment

warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # there is no pytest.ini to declare them in
pytestmark = pytest.mark.filterwarnings(*(
    f"ignore:.*{word}" for word in ("torch.jit", "[Uu]npickler", "non-tuple", "autocast")))
slow = pytest.mark.slow  # more than a few seconds
cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
name_of = lambda value: getattr(value, "__name__", str(value))
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
each_encoding = pytest.mark.parametrize("pe,pe_at", ENCODINGS)

@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A test is in a folder of its own, with a short text, and leaves PyTorch's switches as they were."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT)
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    torch.set_float32_matmul_precision("highest")

@pytest.fixture(scope="session", autouse=True)
def started(request, tmp_path_factory):
    """The work of tests that are beside the others: {name: its future}."""
    pool = ThreadPoolExecutor(1)
    yield {item.name: pool.submit(item.function.work, tmp_path_factory.mktemp("beside"))
           for item in request.session.items if hasattr(item.function, "work")}
    pool.shutdown(cancel_futures=True)

def beside(work):
    """A test that waits for processes: it begins with the first test, beside the others, in a folder with a
    short text. What it returns is called in its place."""
    def test(started, request):
        (started[request.node.name].result() or str)()
    test.work = lambda folder: (folder / "input.txt").write_text(TEXT) and work(folder)
    return test

def words(*flags):
    return shlex.split(" ".join(map(str, flags)))

class Output(io.StringIO):
    """Standard output that does something, once, when a text with a certain word is written to it."""
    def __init__(self, word="", do=None, terminal=False):
        super().__init__()
        self.word, self.do, self.calls, self.isatty = word, do, [], lambda: terminal
        self.flush = lambda: self.calls.append("flush")

    def write(self, text):
        self.calls.append(text)
        super().write(text)
        if self.do and self.word in text:
            self.do, do = None, self.do
            do()

def call(script, *flags, out=None):
    """Run a script in this process -> exit status, standard output, standard error."""
    status, out, err = 0, out or Output(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *words(*flags)])
        try:
            script.main()
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()

def good(*args, **more):
    """The standard output of a call that ends well."""
    status, out, err = call(*args, **more)
    assert (status, err) == (0, "")
    return out

def refused(result, *parts, status=2):
    """Whether a run ended as it has to when it cannot go on: with a line that has these parts."""
    line = re.fullmatch(r"[\w.]+: (error: |stopped ).*\n", result[2])
    return result[0] == status and bool(line) and all(str(part) in result[2] for part in parts)

def train(script, *flags):
    """The model that a script trains."""
    with redirect_stdout(io.StringIO()):
        return script.train(script.parse_args(words(QUICK, *flags)))[0]

STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

def start(folder, *command, env=(), **more):
    """Start Python with a command line in a folder, its output into pipes."""
    env = os.environ | {name: str(value) for name, value in dict(env).items()}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=folder) | more
    return subprocess.Popen([sys.executable, *words(*command)], **options)

def end(process, seconds=120):
    """Wait for a process -> exit status, standard output, standard error."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err

def until(condition, process):
    """Wait for a condition while a process runs."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)

def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))

def losses(path):
    """Of the rows of a CSV what has to be the same when a run is repeated."""
    same = "experiment pe_type params data_crc32 flags curve".split()
    return [[cell for name, cell in row.items() if name in same or "loss" in str(name)] for row in rows(path)]

def files(folder="."):
    return {path: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}

# --- The files -------------------------------------------------------------------------------------------
def sections(name):
    """{title: text} of a script, cut at its rulers; "" is what comes before the first."""
    parts = re.split(r"^# --- (.+?) -+\n", (ROOT / name).read_text(), flags=re.M)
    return dict(zip(["", *parts[1::2]], parts[::2]))

def test_the_text_is_tiny_shakespeare():
    assert zlib.crc32((ROOT / "input.txt").read_bytes()) == 3747689809
    assert (ROOT / "results/laptop.txt").read_bytes() == (ROOT / "input.txt").read_bytes()[:32768]

def test_the_scripts_have_the_same_sections_and_gpt_v2_differs_in_docstring_and_model_by_at_most_24_lines():
    one, two, three = (sections(f"{script.__name__}.py") for script in SCRIPTS)
    titles = [title for title in three if title != "Saved runs"]
    assert list(one) == list(two) == titles and len(one) == 8
    one[""], two[""] = one[""].split('"""')[2], two[""].split('"""')[2]
    assert [title for title in one if one[title] != two[title]] == ["Model"]
    lines = difflib.ndiff(*((ROOT / name).read_text().splitlines() for name in ("gpt.py", "gpt_v2.py")))
    assert sum(line[0] in "+-" for line in lines) <= 24

@pytest.mark.parametrize("name", "gpt.py gpt_v2.py gpt_v3.py sweep.sh bench.py test_models.py".split())
def test_the_lines_of_a_file_fit_a_projector(name):
    assert max(map(len, (ROOT / name).read_text().splitlines())) <= 110

@beside
def test_an_import_does_nothing_and_needs_no_compiler(folder):
    code = """import sys, torch; state = torch.get_rng_state(); import gpt, gpt_v2, gpt_v3
assert torch.equal(state, torch.get_rng_state()) and 'torch._dynamo' not in sys.modules"""
    before, env = files(folder), {"PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": 1}
    assert end(start(folder, "-c", shlex.quote(code), env=env)) == (0, "", "") and files(folder) == before

@beside
def test_help_needs_neither_a_cache_folder_nor_docstrings(folder):
    names = "TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR XDG_CACHE_HOME HOME TMPDIR".split()
    env = dict.fromkeys(names, "/dev/null/nowhere")
    status, out, err = end(start(folder, "-OO", ROOT / "gpt.py", "--help", env=env))
    assert (status, err) == (0, "") and "--learning_rate" in out

# --- The models ------------------------------------------------------------------------------------------
def settings(**fields):
    return SimpleNamespace(**dict(block_size=12, n_embd=48, n_head=4, n_layer=2, dropout=0.0, pe="sinpe",
                                  pe_at="input", attn="mha", n_kv_head=2, kv_rank=10, mlp="gelu", codebook=7,
                                  device="cpu", dtype="float32") | fields)

def make(script, seed=0, **fields):
    """A small model in float64, its weights large enough for attention to matter."""
    torch.manual_seed(seed)
    model = script.GPT(settings(**fields), 11).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model

def tokens(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))

def test_gpt_and_gpt_v2_are_the_same_function_of_the_same_weights():
    one, two, x = make(gpt), make(gpt_v2, seed=1), tokens(3, 12)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x)[0], two(x)[0])
    torch.testing.assert_close(*(torch.autograd.grad(model(x, x.flip(0))[1], [*model.parameters()])
                                 for model in (one, two)))

@pytest.mark.parametrize("attn,kv_heads", [("mha", 4), ("gqa", 2), ("mqa", 1)])
@each_encoding
def test_attention_of_gpt_v3_is_the_one_written_out(pe, pe_at, attn, kv_heads):
    attention = make(gpt_v3, pe=pe, pe_at=pe_at, attn=attn).blocks[0].attn
    turn = attention.pe if pe_at == "qk" else lambda x: x
    x = torch.randn(2, 12, 48, dtype=torch.double)
    out, qkv = torch.empty_like(x), x @ attention.c_attn.weight.T + attention.c_attn.bias
    assert qkv.shape[-1] == 48 + 24 * kv_heads
    for b, h in itertools.product(range(2), range(4)):
        kv = h * kv_heads // 4  # the head of keys and values
        q, k, v = (qkv[b, :, 12 * head:12 * head + 12] for head in (h, 4 + kv, 4 + kv_heads + kv))
        q, k = turn(q), turn(k)
        for t in range(12):
            out[b, t, 12 * h:12 * h + 12] = torch.softmax(k[:t + 1] @ q[t] / 12 ** 0.5, dim=0) @ v[:t + 1]
    torch.testing.assert_close(attention(x), out @ attention.c_proj.weight.T + attention.c_proj.bias)

@each_encoding
def test_latent_attention_is_the_one_written_out(pe, pe_at):
    attention, own = make(gpt_v3, pe=pe, pe_at=pe_at, attn="mla").blocks[0].attn, 6 * (pe_at == "qk")
    turn = attention.pe if own else lambda x: x
    x = torch.randn(2, 12, 48, dtype=torch.double)
    queries, latents, out = x @ attention.c_q.weight.T, x @ attention.c_latent.weight.T, torch.empty_like(x)
    for b, h in itertools.product(range(2), range(4)):
        q = queries[b, :, (12 + own) * h:(12 + own) * (h + 1)]
        kv = attention.ln_latent(latents[b, :, :10]) @ attention.c_kv.weight.T
        k, v = kv[:, 12 * h:12 * h + 12], kv[:, 48 + 12 * h:48 + 12 * h + 12]
        scores = (q[:, :12] @ k.T + turn(q[:, 12:]) @ turn(latents[b, :, 10:]).T) / (12 + own) ** 0.5
        scores += torch.full((12, 12), -math.inf).triu(1)
        out[b, :, 12 * h:12 * h + 12] = torch.softmax(scores, dim=-1) @ v
    torch.testing.assert_close(attention(x), out @ attention.c_proj.weight.T + attention.c_proj.bias)

def test_vq_is_attention_to_a_codebook_in_each_head():
    vq, x = make(gpt_v3, mlp="vq").blocks[0].mlp, torch.randn(2, 5, 48, dtype=torch.double)
    heads = [part @ codes.T / 12 ** 0.5 for part, codes in zip(x.split(12, dim=-1), vq.codebook)]
    expected = [torch.softmax(scores, dim=-1) @ codes for scores, codes in zip(heads, vq.codebook)]
    torch.testing.assert_close(vq(x), torch.cat(expected, dim=-1))

def test_positional_encodings_are_their_formulas_and_rope_makes_scores_of_distances():
    table = lambda pe, T, C: make(gpt_v3, pe=pe, n_head=1, n_layer=1, block_size=T, n_embd=C).float().pe
    x, t = torch.randn(2, 5, 6), torch.arange(5)[:, None]
    sin, rope, randn = (table(pe, 9, 6)(x) for pe in ("sinpe", "rope", "randn"))
    angle = t * torch.tensor([10000 ** (-2 * i / 6) for i in range(3)])
    wave = torch.stack((angle.sin(), angle.cos()), dim=-1)  # (5, 3, 2)
    torch.testing.assert_close(sin, x + wave.flatten(1))
    turned = torch.view_as_complex(x.view(2, 5, 3, 2)) * torch.exp(1j * angle)
    torch.testing.assert_close(rope, torch.view_as_real(turned).flatten(2))
    torch.testing.assert_close((randn - x)[0], (randn - x)[1])  # the same for every sequence
    noise = table("randn", 1000, 64)(torch.zeros(1000, 64))
    assert abs(noise.std() - 0.02) < 2e-4 and abs(noise.mean()) < 5e-4
    q, k = (table("rope", 64, 16)(row.expand(64, 16)) for row in torch.randn(2, 16))
    one, two = ((q @ k.T).diagonal(distance) for distance in (-5, 7))
    assert one.std() < 1e-4 and two.std() < 1e-4 < abs(one[0] - two[0])

@pytest.mark.parametrize("script,fields", [(gpt, {}), (gpt_v2, {}), *(
    (gpt_v3, dict(pe=pe, pe_at=pe_at, attn=attn, mlp=mlp)) for (pe, pe_at), (attn, mlp) in
    zip([*ENCODINGS, *ENCODINGS], KINDS * 2))], ids=name_of)
def test_a_token_sees_all_before_it_and_none_after(script, fields):
    model, x = make(script, **fields), tokens(1, 12)
    for t in range(12):
        other = x.clone()
        other[0, t] = (x[0, t] + 1) % 11
        changed = (model(other)[0] - model(x)[0]).abs().amax(dim=(0, 2))
        assert changed[:t].sum() < 1e-12 and changed[t:].amin() > 1e-6

@each_script
def test_initial_weights_and_loss(script):
    torch.manual_seed(0)
    model = script.GPT(settings(block_size=64, n_embd=128, n_head=4, pe="rope", pe_at="qk"), 65)
    for name, p in model.named_parameters():
        if "bias" in name:
            assert torch.all(p == 0), name
        elif "ln" not in name:
            assert abs(p.std() - 0.02) < 2e-3 and abs(p.mean()) < 2e-3, name
    assert abs(model(x := torch.randint(65, (4, 64)), x.flip(0))[1].item() - math.log(65)) < 0.1
    assert (model.lm_head.bias is None) == (script is gpt_v3)

def test_the_weights_of_gpt_v3_keep_their_names_and_only_randn_saves_a_table():
    block = "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj".split()
    layers = [*(f"blocks.0.{name}" for name in block), "ln_f"]
    pairs = [f"{name}.{end}" for name in layers for end in ("weight", "bias")]
    weights = ["wte.weight", *pairs, "lm_head.weight"]
    for pe, pe_at in ENCODINGS:
        model = make(gpt_v3, n_layer=1, pe=pe, pe_at=pe_at)
        saved = [] if pe != "randn" else ["pe.table"] if pe_at == "input" else ["blocks.0.attn.pe.table"]
        assert sorted(model.state_dict()) == sorted(weights + saved)
        assert [name for name, _ in model.named_parameters()] == weights  # no table is trained

@each_script
def test_the_alphabet_is_learnt_by_heart(script):
    Path("input.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 40)
    good(script, QUICK, "--max_iters 150 --eval_interval 150 --learning_rate 1e-2 --dropout 0 --csv r.csv")
    assert float(rows("r.csv")[0]["val_loss"]) < 0.02

@each_encoding
@pytest.mark.parametrize("attn,mlp", KINDS)
def test_a_cache_changes_no_logit_and_keeps_no_more_than_it_has_to(pe, pe_at, attn, mlp):
    """However the tokens are split into calls."""
    model, x = make(gpt_v3, pe=pe, pe_at=pe_at, attn=attn, mlp=mlp).eval(), tokens(2, 12)
    expected = model(x)[0]
    for sizes in ([1] * 12, [12], [4] + [1] * 8, [5, 7], [1, 2, 3, 1, 5]):
        cache = gpt_v3.Cache()
        cached = torch.cat([model(part, cache=cache)[0] for part in x.split(sizes, dim=1)], dim=1)
        torch.testing.assert_close(cached, expected, rtol=0, atol=1e-9)
    numbers = sum(part.numel() for part in cache.tensors[model.blocks[0].attn]) / 2 / 12  # per token
    assert numbers == {"mha": 2 * 48, "mqa": 2 * 12, "gqa": 4 * 12, "mla": 10 + 6 * (pe_at == "qk")}[attn]

def test_more_tokens_than_block_size_are_refused():
    model, cache = make(gpt_v3), gpt_v3.Cache()
    model(tokens(1, 12), cache=cache)
    for call_it in (lambda: model(tokens(1, 13)), lambda: model(tokens(1, 1), cache=cache)):
        with pytest.raises(ValueError, match="13 tokens are more than the block_size of 12"):
            call_it()

@each_encoding
@pytest.mark.parametrize("length", [1, 20])
def test_past_block_size_generation_begins_anew_from_the_last_half(pe, pe_at, length):
    model, seen = make(gpt_v3, pe=pe, pe_at=pe_at).eval(), tokens(2, length)
    whole, drawn = model.generate(seen, 30, temperature=0), list(model.stream(seen, 30, temperature=0))
    assert len(drawn) == 30 and torch.equal(whole, torch.cat([seen, *drawn], dim=1))
    for token in drawn:
        seen = seen[:, -6:] if seen.shape[1] > 12 else seen
        assert torch.equal(token, model(seen)[0][:, -1:].argmax(-1))
        seen = torch.cat((seen, token), dim=1)

def test_sdpa_takes_the_path_that_training_and_evaluation_share():
    switches = torch.backends.cuda
    for script in (gpt_v2, gpt_v3):
        switches.enable_cudnn_sdp(True)
        switches.allow_fp16_bf16_reduction_math_sdp(False)
        make(script)
        assert not switches.cudnn_sdp_enabled() and switches.fp16_bf16_reduction_math_sdp_allowed()
    for device, dtype, block_size in itertools.product(("cpu", "cuda"), ("bfloat16", "float32"), (512, 513)):
        make(gpt_v3, device=device, dtype=dtype, block_size=block_size)
        slow = (device, dtype, block_size) == ("cpu", "bfloat16", 512)
        assert switches.flash_sdp_enabled() == (not slow)

@each_script
def test_all_matrix_products_are_in_bfloat16_and_all_weights_in_float32(script):
    """Those inside SDPA, too, which has no fused kernel for dropout on a CPU."""
    seen = set()
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if re.match(r"aten\.(mm|addmm|bmm|baddbmm|_scaled_dot)", name := str(function.overloadpacket)):
                seen.add((name, args[1].dtype))
            return function(*args, **kwargs or {})
    with Watch():
        model = train(script, "--dropout 0.2 --dtype bfloat16 --max_iters 1 --eval_iters 1")
    assert {dtype for _, dtype in seen} == {torch.bfloat16} and "aten.bmm" in dict(seen)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

# --- Dropout ---------------------------------------------------------------------------------------------
PLACES = [("cpu", "eager"), pytest.param("cpu", "compiled", marks=slow),
          *(pytest.param("cuda", how, marks=cuda) for how in ("eager", "compiled"))]

@pytest.mark.parametrize("device,how", PLACES)
@each_script
def test_dropout_drops_its_share_without_a_pattern_and_the_same_forward_and_backward(script, device, how):
    """The last layers of a block add 1 and 2 to nothing at all, so that its output spells out both masks."""
    p, shape = 0.2, (8, 32, 64)
    torch.manual_seed(0)
    block = script.Block(settings(block_size=32, n_embd=64, n_head=1, dropout=p)).to(device)
    nothing = torch.nn.Identity()
    if script is gpt_v3:
        last, block.ln_1, block.ln_2 = [block.attn.c_proj, block.mlp.c_proj], nothing, nothing
    else:
        last, block.ln1, block.ln2 = [block.sa.proj, block.ffwd.net[2]], nothing, nothing
        block.sa.heads[0] = nothing  # there is less to compile
    for number, layer in enumerate(last, 1):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, number)
    if how == "compiled":
        torch.compiler.reset()
        torch.compiler.set_stance("default")
        block.compile()
    masks = []
    for _ in range(2):
        out, grad = block(torch.zeros(shape, device=device)), torch.randn(shape, device=device)
        out.backward(grad)
        code = (out.detach() * (1 - p)).round()
        torch.testing.assert_close(out.detach() * (1 - p), code)
        for layer, mask in zip(last, (code % 2, code // 2)):
            expected = (grad * mask / (1 - p)).sum((0, 1))
            torch.testing.assert_close(layer.bias.grad, expected, rtol=0, atol=1e-3)  # one element is worth 1
            layer.bias.grad = None
            masks.append(mask.double().cpu())
    noise = (torch.stack(masks) - (1 - p)) / math.sqrt(p * (1 - p))  # of mean 0 and variance 1
    means = [*noise.mean((1, 2, 3)), *((a * b).mean() for a, b in itertools.combinations(noise, 2))]
    means += [(mask.narrow(axis, 1, size - 1) * mask.narrow(axis, 0, size - 1)).mean()  # neighbours
              for mask in noise for axis, size in enumerate(shape)]
    assert max(map(abs, means)) < 5 / math.sqrt(7 / 8 * masks[0].numel())

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_script
def test_cuda_graphs_train_like_the_eager_model_and_draw_new_masks(script):
    flags = "--device cuda --dtype float32 --max_iters 12 --eval_interval 6 --csv r.csv --dropout"
    for how in ("--compile", "--no-compile"):
        good(script, QUICK, flags, 0, how)
    graphs, eager = (float(row["train_loss"]) for row in rows("r.csv"))
    assert graphs == pytest.approx(eager, abs=1e-3)
    config = script.parse_args(words(QUICK, flags, 0.5))
    data = tokens(500).cuda()
    model = script.GPT(config, 11).cuda()
    script.compile_blocks(model, data, config)
    start = torch.zeros(config.batch_size, dtype=torch.long, device="cuda")
    losses = {script.compute_loss(model, data, start, config).item() for _ in range(3)}
    assert "forward" in vars(model) and len(losses) == 3  # dropout
    assert script.estimate_loss(model, data, config) == script.estimate_loss(model, data, config)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_resumed_run_on_cuda_draws_the_masks_and_batches_that_it_would_have_drawn():
    flags = "--device cuda --dtype float32 --dropout 0.5 --eval_interval 4 --csv r.csv --max_iters"
    good(gpt_v3, QUICK, flags, 8)
    good(gpt_v3, QUICK, flags, 4, "--save run.pt")
    good(gpt_v3, "--resume run.pt --max_iters 8 --csv r.csv --device cuda --max_new_tokens 0")
    whole, _, resumed = (float(row["train_loss"]) for row in rows("r.csv"))
    assert resumed == pytest.approx(whole, abs=1e-4)

# --- Evaluation ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@each_script
def test_evaluation_repeats_itself_leaves_training_alone_and_is_the_mean_of_spaced_windows(script, dropout):
    config, data = script.parse_args(words(QUICK)), tokens(500)
    model = make(script, dropout=dropout, block_size=8)
    first, state = script.estimate_loss(model, data, config), torch.get_rng_state()
    assert script.estimate_loss(model, data, config) == first and torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    if script is gpt_v3:  # the published losses, with the dropout of attention on
        assert (script.estimate_loss(model, data, config, attention_dropout=True) == first) == (not dropout)
        assert script.estimate_loss(model, data, config) == first
    model.eval()
    by_hand = [F.cross_entropy(model(data[None, at:at + 8])[0][0], data[at + 1:at + 9]).item()
               for at in (i * 491 // 7 for i in range(8))]  # the first and the last window are in it
    assert first == pytest.approx(sum(by_hand) / 8, abs=1e-6)

@each_script
def test_how_often_one_evaluates_does_not_change_the_training(script):
    for interval in (1, 4, 100):
        good(script, QUICK, "--dropout 0.3 --max_iters 6 --csv r.csv --eval_interval", interval)
    assert len({(row["train_loss"], row["val_loss"]) for row in rows("r.csv")}) == 1

# --- Training --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script,flags,backend", [
    (gpt, "", "aot_eager"), (gpt_v2, "", "aot_eager"), (gpt_v3, "--pe rope --pe_at qk", "aot_eager"),
    pytest.param(gpt_v3, "--grad_accum 2", "inductor", marks=slow)], ids=name_of)
def test_compiling_changes_no_loss_and_no_name_in_two_graphs(script, flags, backend, monkeypatch, capsys):
    """A graph of the training pass and one of the evaluation serve every layer and every part of a batch."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    counters = torch._dynamo.utils.counters
    counters.clear()
    one, two = (dict(train(script, "--dropout 0 --dtype float32 --csv r.csv", flags, how).state_dict())
                for how in ("--no-compile", "--compile"))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert list(one) == list(two) and capsys.readouterr().err == ""  # no warning
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    eager, compiled = (float(row["val_loss"]) for row in rows("r.csv"))
    assert eager == pytest.approx(compiled, abs=1e-5)

@slow
@beside
def test_without_a_compiler_the_run_goes_on_after_one_line(folder):
    env = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": folder / "cache"}
    status, out, err = end(start(folder, ROOT / "gpt_v3.py", QUICK, "--n_layer 1 --compile", env=env))
    assert re.fullmatch("gpt_v3.py: warning: continuing without --compile: .*\n", err)
    assert status == 0 and "final: " in out

def test_the_learning_rate_warms_up_and_decays():
    config = SimpleNamespace(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100)
    for config.min_lr, expected in (0.1, [0.1, 1.0, 1.0, 0.55, 0.1]), (None, [0.1, 1.0, 1.0, 1.0, 1.0]):
        assert [gpt_v3.get_lr(step, config) for step in (0, 9, 10, 55, 100)] == pytest.approx(expected)

@each_script
def test_a_loss_that_is_not_finite_ends_the_run_without_a_row(script, monkeypatch):
    calls, loss = itertools.count(), F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args: loss(*args) * (1 if next(calls) < 10 else math.nan))
    assert refused(call(script, QUICK, "--csv r.csv"), "step 4", "--learning_rate", status=1)
    assert rows("r.csv") == []

@each_script
def test_progress_is_lines_in_a_file(script):
    piped = good(script, f"{QUICK} --max_iters 12 --eval_interval 12")
    speed, loss = r" \| \d+\.\d\d ms/iter, \d+k tok/s, eta 0:0\d", ": train loss X, val loss X"
    pattern = f"""{script.__name__}: 0.01M parameters, cpu, .*, eager\n--tiny is a preset for a laptop
step 0{loss}\nstep 10{speed}\nstep 12{loss}{speed}\nfinal: train loss X, val loss X [(]best X at step 12[)]
(?s:.{{21}})\n""".replace("X", r"\d\.\d{4}")  # the sample: a character to begin with, and 20
    assert re.fullmatch(pattern, piped) and "\r" not in piped
    assert "--tiny is" not in good(script, QUICK, "--tiny")
    assert good(script, QUICK, "--max_new_tokens 0").endswith("at step 4)\n")

def screen(folder, columns, *command, stop=None):
    """The lines on a terminal of so many columns when a script has ended -> lines, exit status."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    process = start(folder, *command, stdin=slave, stdout=slave, stderr=slave, text=False,
                    env=dict(COLUMNS=columns))  # a shell may have told its own width
    os.close(slave)
    text = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(master, 4096):
            text += part
            if stop and b"step 30 " in text:
                process.send_signal(stop)
                stop = None
    lines, column = [""], 0
    for char in re.split(r"(\x1b\[K|.)", text.decode(), flags=re.S):
        if char == "\n":
            lines.append("")
        elif char == "\r":
            column = 0
        elif char == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif char:
            if column == columns:  # the terminal goes on in the next line
                lines.append("")
                column = 0
            lines[-1] = lines[-1][:column] + char + lines[-1][column + 1:]
            column += 1
    return lines, process.wait()

@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("script", [gpt, gpt_v3], ids=name_of)
def test_progress_on_a_terminal_is_one_line_that_leaves_nothing_behind(script, columns, tmp_path):
    command = ROOT / f"{script.__name__}.py", QUICK, "--max_new_tokens 0 --eval_interval 100"
    lines, status = screen(tmp_path, columns, *command, "--max_iters 100")
    text = "".join(lines)
    assert status == 0 and "step 10 " not in text and len(lines) <= 12 and text.count("ms/iter") == 1
    lines, status = screen(tmp_path, columns, *command, "--max_iters 100000 --eval_interval 100000",
                           stop=signal.SIGTERM)
    assert status == 143 and re.fullmatch(rf"{script.__name__}.py: stopped at step \d+", lines[-2])
    assert "ms/iter" not in "".join(lines)

@each_script
def test_the_defaults_are_the_experiment_in_a_notebook_too_and_other_flags_win_over_tiny(script, monkeypatch):
    seed = dict(batch_size=64, block_size=256, max_iters=5000, eval_interval=500, eval_iters=200, n_embd=384,
                learning_rate=3e-4, n_head=6, n_layer=6, dropout=0.2, seed=1337, data="input.txt")
    assert vars(script.parse_args([])).items() >= seed.items()
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "/run/kernel-1.json"])
    assert script.parse_args() == script.parse_args([])
    tiny, given = vars(script.parse_args(["--tiny"])), {"n_layer": 3, "dropout": 0.1}
    for flags in ("--tiny --n_layer 3 --dropout=0.1", "--n_layer 3 --dropout=0.1 --tiny"):
        assert vars(script.parse_args(words(flags))) == tiny | given
    assert tiny["n_embd"] < seed["n_embd"] and "laptop" not in good(script, QUICK, "--tiny")

# --- Rows ------------------------------------------------------------------------------------------------
COLUMNS = """experiment,pe_type,n_embd,n_head,n_layer,train_loss,val_loss,best_val_loss,best_iter,
    published_train_loss,published_val_loss,params,ms_per_iter,train_s,device,torch,data,data_crc32,flags,
    curve""".replace("\n    ", "")
SCHEDULE = "--pe rope --pe_at qk --min_lr 1e-4 --warmup_iters 2 --grad_clip 0.5 --grad_accum 2 --beta2 0.95"

@pytest.mark.parametrize("script,flags", [(gpt, ""), (gpt_v2, ""), (gpt_v3, SCHEDULE)], ids=name_of)
def test_a_row_has_what_it_takes_to_run_it_again(script, flags, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # which alone is not torchrun
    out = good(script, QUICK, "--dropout 0.1 --seed 7 --learning_rate 0.0123 --csv r.csv", flags)
    (row,), header = rows("r.csv"), Path("r.csv").read_text().split("\n")[0]
    good(script, "--data input.txt", row["flags"], "--csv r.csv --device cpu")
    assert losses("r.csv")[0] == losses("r.csv")[1] and header == COLUMNS
    curve = {step: (train, val) for step, train, val in (point.split(":") for point in row["curve"].split())}
    best = min(curve, key=lambda step: float(curve[step][1]))
    four = lambda *names: tuple(f"{float(row[name]):.4f}" for name in names)
    assert list(curve) == ["0", "2", "4"] and curve["4"] == four("train_loss", "val_loss")
    assert best == row["best_iter"] and (curve[best][1],) == four("best_val_loss")
    assert "train loss {}, val loss {} (best".format(*curve["4"]) in out
    assert row["experiment"] == script.__name__ and row["data"] == "input.txt"
    assert row["pe_type"] == ("rope" if script is gpt_v3 else "learned")
    assert (row["published_val_loss"] == "") == (script is not gpt_v3)
    assert int(row["data_crc32"]) == zlib.crc32(TEXT.encode())
    assert int(row["params"]) == sum(p.numel() for p in train(script, row["flags"]).parameters())

@each_script
def test_once_does_nothing_if_the_row_exists(script):
    flags = f"{QUICK} --once --csv r.csv"
    good(script, flags)
    assert good(script, flags) == "nothing to do: r.csv has the row of this run\n" and len(rows("r.csv")) == 1
    good(script, flags, "--seed 2")
    Path("input.txt").write_text(TEXT[1:])  # of the same name
    good(script, flags)
    good(script, QUICK, "--csv r.csv")
    assert len(rows("r.csv")) == 4

fork = multiprocessing.get_context("fork") if os.name == "posix" else None  # torch is imported once

def test_parallel_writers_tear_no_row_and_write_one_header():
    row = {"data": 'a "quoted", path'}
    write = lambda n: [gpt.append_row("r.csv", row | {"experiment": n, "n_embd": i}) for i in range(50)]
    writers = [fork.Process(target=write, args=(n,)) for n in range(4)]
    for act in (fork.Process.start, fork.Process.join):
        for writer in writers:
            act(writer)
    found = [(row["experiment"], row["n_embd"], row["data"]) for row in rows("r.csv")]
    assert sorted(found) == sorted((str(n), str(i), row["data"]) for n in range(4) for i in range(50))
    assert Path("r.csv").read_text().count("experiment") == 1

def in_a_process(work):
    process = fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0

@each_script
@pytest.mark.parametrize("room", [0, 10])
def test_a_disk_that_is_full_at_the_row_prints_it_and_the_next_row_is_whole(script, room):
    good(script, QUICK, "--csv r.csv")
    loss, size = rows("r.csv")[0]["val_loss"], os.path.getsize("r.csv") + room
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        result = call(script, QUICK, "--csv r.csv")
        assert refused(result, "--csv r.csv", loss, status=1)
    in_a_process(work)
    good(script, QUICK, "--csv r.csv")
    assert losses("r.csv")[-1] == losses("r.csv")[0]

# --- Faults ----------------------------------------------------------------------------------------------
@each_script
def test_names_are_a_text_and_what_a_terminal_cannot_show_is_a_question_mark(script, monkeypatch):
    Path("input.txt").write_text("Anaïs\nBüşra\nChloé\nOmar\nZoë\n" * 99, encoding="utf-8")  # one a line
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words(QUICK, "--max_new_tokens 200")])
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as with PYTHONIOENCODING=ascii
    with redirect_stdout(out):
        script.main()
    assert b"?" in out.buffer.getvalue().split(b"final: ")[1]

@each_script
def test_neither_a_byte_order_mark_nor_line_ends_change_a_run(script):
    text = TEXT.replace("a", "à").encode()
    for content in (text, b"\xef\xbb\xbf" + text, text.replace(b"\n", b"\r\n")):
        Path("input.txt").write_bytes(content)
        good(script, QUICK, "--csv r.csv")
    assert losses("r.csv") == losses("r.csv")[:1] * 3

@beside
def test_a_script_copied_alone_outlives_its_reader_and_a_full_disk_for_its_row_and_its_saves(folder):
    for name in ("gpt.py", "gpt_v2.py", "gpt_v3.py"):
        shutil.copy(ROOT / name, folder)
    long = f"{QUICK} --max_iters 200 --eval_interval 10"
    with open("/dev/full", "w") as full:
        started = [start(folder, "gpt_v3.py", long, "--csv full.csv --save full.pt", stdout=full),
                   start(folder, "gpt.py", long, "--csv head.csv"), start(folder, "gpt_v2.py", long)]
    for process in started[1:]:  # as `| head -3`
        assert [bool(process.stdout.readline()) for _ in range(3)] == [True] * 3
        process.stdout.close()
    for process, status in zip(started, (0, 0, 1)):
        with process.stderr:
            assert (process.stderr.read(), process.wait(60)) == ("", status)
    assert len(rows(folder / "head.csv")) == len(rows(folder / "full.csv")) == 1
    assert load(folder / "full.pt")["step"] == 200

@each_script
@pytest.mark.parametrize("when", ["step 10", "final"])
def test_ctrl_c_is_one_line_and_a_notebook_gets_its_signals_back(script, when):
    handlers = lambda: [signal.getsignal(number) for number in STOPS]
    before, interrupt = handlers(), Output(when, lambda: os.kill(os.getpid(), signal.SIGINT))
    result = call(script, QUICK, "--max_iters 20 --csv r.csv", out=interrupt)
    assert refused(result, "stopped", status=130) and rows("r.csv") == []
    assert handlers() == before and good(script, QUICK) and handlers() == before

@each_script
def test_train_returns_the_model_that_a_signal_leaves_also_during_an_evaluation(script):
    config = script.parse_args(words(QUICK, "--eval_iters 100000"))  # which would take minutes
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        model, chars = script.train(config)
    assert err.getvalue().count("\n") == 1 and "stopped at step 0" in err.getvalue()
    assert not model.training and model.generate(torch.zeros(2, 1, dtype=torch.long), 5).shape == (2, 6)
    config.eval_iters = 2  # what ended that run does not cut short what comes later
    data = tokens(100)
    assert script.estimate_loss(model, data, config) == script.estimate_loss(model, data, config, [])

@slow
@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_an_interrupted_cell_of_a_notebook_leaves_the_model_and_its_characters(script, tmp_path):
    """In a real kernel: a file pasted as a whole, and train() called."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    source = (ROOT / f"{script.__name__}.py").read_text()
    interrupt = "import _thread, threading; threading.Timer(3, _thread.interrupt_main).start()\n"
    use = "print(type(model).__name__, len(chars), model.generate(torch.tensor([[0]]), 3).shape)"
    called = f"model, chars = train(parse_args({words(QUICK, '--max_iters 100000')}))"
    cells = [interrupt + source, use, interrupt + called, use]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert outputs[1] == outputs[3] == f"GPT {len(set(TEXT))} torch.Size([1, 4])\n"
    assert all("stopped at step" in outputs[i] and "Traceback" not in outputs[i] for i in (0, 2))

@slow
@beside
def test_ctrl_c_while_cpp_is_compiled_ends_the_run(folder):
    """A terminal sends it to the C++ compiler, too, which fails."""
    started = [start(folder, ROOT / name, QUICK, "--n_head 1 --n_layer 1 --compile", start_new_session=True,
                     env={"TORCHINDUCTOR_CACHE_DIR": folder / name[:-3]}) for name in ("gpt.py", "gpt_v3.py")]
    for process in started:
        ps = ["ps", "-o", "comm", "-s", str(process.pid)]
        until(lambda: b"cc1plus" in subprocess.run(ps, capture_output=True).stdout, process)
        os.killpg(process.pid, signal.SIGINT)
    for process in started:
        assert refused(end(process), "Ctrl-C", status=130)

# --- Bad input -------------------------------------------------------------------------------------------
BAD_FLAGS = {  # and what the message has in it
    "--n_emb 32": ["--n_emb"], "--frobnicate": ["--frobnicate"], "--n_head": ["--n_head"],
    "--n_embd 100 --n_head 6": ["--n_embd 100", "--n_head 6"],
    "--n_embd 0": ["--n_embd: must be between 1 and", "not 0"],
    "--n_embd 3.5": ["--n_embd", "number", "3.5"], "--n_layer 99999999999": ["--n_layer", "1000000000"],
    "--eval_interval -3": ["--eval_interval: must be between 1 and", "not -3"],
    "--dropout 1": ["--dropout: must be between 0 and 0.99, not 1"], "--dropout nan": ["--dropout", "nan"],
    "--learning_rate inf": ["--learning_rate: must be between 0 and 10, not inf"],
    "--seed -1": ["--seed: must be", "not -1"], "--max_new_tokens -1": ["--max_new_tokens", "not -1"],
    "--dtype float16": ["--dtype", "float16", "bfloat16"], "--device toaster": ["--device", "toaster", "cpu"],
    "--data nowhere.txt": ["--data nowhere.txt", "No such file", "https://", "tinyshakespeare/input.txt"],
    "--data empty.txt": ["--data empty.txt", "--block_size"], "--data .": ["--data ."],
    "--data latin1.txt": ["--data latin1.txt", "utf-8", "UTF-8"],
    "--data short.txt --block_size 8": ["--data short.txt", "--block_size 8"],
    "--csv nowhere/r.csv": ["--csv nowhere/r.csv", "No such file"], "--csv .": ["--csv .", "directory"],
    "--csv foreign.csv": ["--csv foreign.csv", "columns"]}
BAD_FLAGS_V3 = {
    "--pe rotary": ["--pe", "rotary", "rope"], "--pe rope --n_embd 9 --n_head 3": ["--pe rope", "even"],
    "--pe sinpe --pe_at qk --n_embd 18 --n_head 6": ["--pe sinpe", "qk", "--n_embd 18", "even", "3"],
    "--pe rope --pe_at qk --attn mla --n_embd 12 --n_head 2": ["--pe rope", "--n_head 2", "even", "3"],
    "--pe randn --pe_at qk --attn mla --n_embd 4 --n_head 4": ["--pe randn", "--n_embd 4", "0"],
    "--attn gqa --n_head 6 --n_kv_head 4": ["--n_head 6", "--n_kv_head 4"],
    "--n_kv_head 2": ["--n_kv_head 2", "gqa"], "--attn mqa --kv_rank 2": ["--kv_rank 2", "mla"],
    "--attn mla --kv_rank -1": ["--kv_rank", "not -1"], "--codebook 9": ["--codebook 9", "vq"],
    "--beta2 1": ["--beta2", "0.99999"], "--grad_accum 3": ["--batch_size", "--grad_accum"],
    "--top_k 0": ["--top_k", "not 0"], "--min_lr -1": ["--min_lr", "not -1"],
    "--resume nowhere.pt": ["nowhere.pt", "No such file"], "--save no/run.pt": ["--save no/run.pt", "folder"],
    "--resume a.pt --generate a.pt": ["--resume", "--generate"], "--save foreign.csv": ["--save foreign.csv"]}

@pytest.mark.parametrize("script,flags,parts", [
    *((script, *bad) for script in (gpt, gpt_v3) for bad in BAD_FLAGS.items()),
    *((gpt_v3, *bad) for bad in BAD_FLAGS_V3.items())], ids=name_of)
def test_bad_input_gets_one_line_and_touches_nothing(script, flags, parts):
    for name, content in {"empty.txt": "", "short.txt": "ab" * 40, "foreign.csv": "a,b\n1,2\n"}.items():
        Path(name).write_text(content)
    Path("latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    before, result = files(), call(script, flags, "--device cpu" * ("--device" not in flags))
    assert refused(result, *parts) and result[1] == "" and files() == before

def fuzz(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                               suppress_health_check=list(hypothesis.HealthCheck))

ODD = "- -- --tiny inf nan 1e400 cpu cuda:-1 cuda mps xla meta hpu rope qk . .. /dev/null".split()
WORDS = (some.text(some.characters(exclude_characters="\0"), max_size=8) | some.floats().map(str)
         | some.integers(-2, 2**70).map(str) | some.sampled_from(ODD))
DEFAULTS = vars(gpt_v3.parse_args([]))
SIZES, RATES = ([name for name in DEFAULTS if type(DEFAULTS[name]) is kind] for kind in (int, float))

@fuzz(200)
@hypothesis.given(some.lists(some.tuples(some.sampled_from([*DEFAULTS, "x"]), WORDS, some.booleans()),
                             max_size=4))
def test_any_flags_are_taken_or_refused_in_one_line(flags):
    argv = []
    for flag, word, joined in flags:
        argv += [f"--{flag}={word}"] if joined else [f"--{flag}", word]
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
        try:
            gpt_v3.parse_args(argv)
            assert err.getvalue() == ""
        except SystemExit as end:
            assert end.code == 2 and len(err.getvalue().splitlines()) == 1

@fuzz(25)
@hypothesis.given(sizes=some.dictionaries(some.sampled_from(SIZES), some.integers(1, 9), max_size=3),
                  rates=some.dictionaries(some.sampled_from(RATES), some.floats(0, 1e308), max_size=2),
                  encoding=some.sampled_from(ENCODINGS))
def test_any_small_run_ends_well_or_in_one_line(sizes, rates, encoding):
    flags = sizes | rates | dict(zip(("pe", "pe_at"), encoding))
    result = call(gpt_v3, QUICK, *(f"--{name}={value}" for name, value in flags.items()))
    assert result[::2] == (0, "") or refused(result) or refused(result, "not finite", status=1), result

# --- Saved runs ------------------------------------------------------------------------------------------
RUN = f"""{QUICK} --max_iters 40 --eval_interval 7 --dropout 0.3 --learning_rate 1e-2 --warmup_iters 5
    --min_lr 1e-4 --max_new_tokens 0 --optimizer muon --attn mla --mlp vq --pe_at qk"""
LONG = f"{RUN} --max_iters 200 --eval_interval 4"

def load(path):
    return torch.load(path, weights_only=True)

def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a if key != "train_s")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

def same_run(a, b):
    """Whether two runs that were saved ended in the same weights, moments, random states and losses."""
    return (all(same(load(f"{a}.pt{best}"), load(f"{b}.pt{best}")) for best in ("", ".best"))
            and {*map(tuple, losses(f"{a}.csv"))} == {*map(tuple, losses(f"{b}.csv"))})

@pytest.fixture
def saved():
    """The file of a small run, run.pt -> its bytes."""
    good(gpt_v3, QUICK, "--save run.pt --n_layer 1")
    return Path("run.pt").read_bytes()

def test_a_run_killed_at_random_moments_and_resumed_equals_one_that_was_not():
    good(gpt_v3, LONG, "--save whole.pt --csv whole.csv")
    chance, killed = random.Random(0), 0
    while killed < 10:
        name, status = f"run{killed}", None
        while status != 0:
            begin = f"--resume {name}.pt" if os.path.exists(f"{name}.pt") else f"{LONG} --save {name}.pt"
            process = fork.Process(target=good, args=(gpt_v3, begin, f"--csv {name}.csv --device cpu"))
            process.start()
            process.join(chance.uniform(0, 0.2 + killed / 50))
            process.kill()
            process.join()
            status = process.exitcode
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
        assert same_run(name, "whole")

@pytest.mark.parametrize("number,status", [(number, 128 + number) for number in STOPS])
def test_a_run_stopped_by_a_signal_says_how_to_go_on_and_equals_one_that_was_not(number, status):
    good(gpt_v3, RUN, "--save whole.pt --csv whole.csv")
    kill = Output("step 10", lambda: os.kill(os.getpid(), number))
    result = call(gpt_v3, RUN, "--save cut.pt --csv cut.csv", out=kill)
    assert refused(result, "stopped", "--resume cut.pt", status=status)
    assert 10 <= load("cut.pt")["step"] <= 12 and rows("cut.csv") == []
    good(gpt_v3, "--resume cut.pt --csv cut.csv --device cpu")
    assert same_run("cut", "whole")
    kill = Output("step 10", lambda: os.kill(os.getpid(), number))
    result = call(gpt_v3, RUN, out=kill)
    assert refused(result, "stopped", status=status) and "--resume" not in result[2]

def test_a_save_that_finds_no_room_costs_a_warning_and_keeps_the_last_one():
    good(gpt_v3, RUN, "--save whole.pt --csv whole.csv")
    def work():
        full = Output("step 10", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)))
        status, out, err = call(gpt_v3, RUN, "--save cut.pt", out=full)
        assert status == 0 and "final: " in out
        assert re.fullmatch("(gpt_v3.py: warning: --save cut.pt.*\n){5,}", err)  # at least one an evaluation
    in_a_process(work)
    assert load("cut.pt")["step"] == 7
    good(gpt_v3, "--resume cut.pt --csv cut.csv --device cpu")
    assert same_run("cut", "whole")

def test_save_replaces_no_file_and_resume_goes_on_further_but_not_back_or_with_another_text(saved):
    Path("other.txt").write_text(TEXT[1:])
    before = files()
    for flags, parts in (("--save run.pt", ["--save run.pt", "--resume"]),
                         ("--resume run.pt --max_iters 3", ["run.pt", "step 4", "--max_iters 3"]),
                         ("--resume run.pt --optimizer muon", ["run.pt has adamw", "--optimizer muon"]),
                         ("--resume run.pt --data other.txt", ["run.pt", "--data other.txt"])):
        result = call(gpt_v3, flags, "--device cpu")
        assert refused(result, *parts) and "step" not in result[1] and files() == before
    good(gpt_v3, "--resume run.pt --max_iters 6 --tiny --csv r.csv --device cpu")  # --tiny changes nothing
    (row,) = rows("r.csv")
    assert load("run.pt")["step"] == 6 and row["n_embd"] == "16" and re.match("0:.* 4:.* 6:", row["curve"])

def test_a_resumed_run_says_when_its_schedule_changes_and_what_does_not_fit(saved):
    state = load("run.pt")
    for flags, said in (("", False), ("--max_iters 9", False), ("--learning_rate 1e-2", True),
                        ("--min_lr 1e-4 --max_iters 9", True)):
        Path("run.pt").write_bytes(saved)
        out = good(gpt_v3, "--resume run.pt --device cpu", flags)
        assert ("learning rate now follows" in out) == said, flags
    other = state["flags"] | {"n_embd": 32}
    wrong = {"flags": (state | {"flags": other}, "its weights do not fit its flags"),
             "new": (state | {"flags": other | {"frob": 1}}, "different flags"),
             "optimizer": (state | {"optimizers": []}, "its optimizer or random state does not fit")}
    for content, message in wrong.values():
        torch.save(content, "bad.pt")
        assert refused(call(gpt_v3, "--resume bad.pt --device cpu"), "bad.pt", message)

def test_load_gives_the_model_ready_to_sample_from(saved):
    model, chars = gpt_v3.load("run.pt")
    assert not model.training and chars == sorted(set(TEXT))
    torch.testing.assert_close(dict(model.state_dict()), dict(load("run.pt")["model"]))

@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sampling_computes_in_dtype(saved, dtype):
    seen = set()
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function.overloadpacket) in ("aten.mm", "aten.addmm"):
                seen.add(args[1].dtype)
            return function(*args, **kwargs or {})
    with Watch():
        good(gpt_v3, "--generate run.pt --max_new_tokens 3 --device cpu --dtype", dtype)
    assert seen == {getattr(torch, dtype)}

def test_a_flag_of_another_shape_is_named(saved):
    flags = {"--n_embd 32": 16, "--n_head 4": 2, "--n_layer 2": 1, "--block_size 9": 8, "--pe rope": "sinpe",
             "--mlp vq": "gelu"}
    for (flag, was), use in itertools.product(flags.items(), ("--resume", "--generate")):
        assert refused(call(gpt_v3, use, "run.pt", flag, "--device cpu"), flag, "run.pt", was)

def test_foreign_and_hostile_files_are_refused_and_not_executed(saved):
    state, Evil = load("run.pt"), type("", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})
    without = lambda *names: {name: value for name, value in state.items() if name not in names}
    bad = {"empty": b"", "text": b"words\n", "half": saved[:len(saved) // 2], "headless": saved[100:],
           "pickle": pickle.dumps({"flags": Evil()}), "flags": pickle.dumps(state["flags"]),
           "number": 1, "list": [state], "module": torch.nn.Linear(1, 1), "tensor": torch.ones(3),
           "evil": Evil(), "evil flags": state | {"flags": Evil()}, "evil chars": state | {"chars": [Evil()]},
           "no flags": without("flags"), "no model": without("model"), "no steps": without("step", "model"),
           "other model": state | {"model": {"x": torch.ones(1)}}}
    for (name, thing), use in itertools.product(bad.items(), ("--resume", "--generate")):
        Path("bad.pt").write_bytes(thing) if isinstance(thing, bytes) else torch.save(thing, "bad.pt")
        assert refused(call(gpt_v3, use, "bad.pt --max_iters 9 --device cpu"), "bad.pt"), (name, use)
    assert refused(call(gpt_v3, "--resume ."), ".: ") and not os.path.exists("executed")

def test_generate_is_deterministic_where_it_has_to_be_and_writes_a_character_at_a_time(saved):
    use = "--generate run.pt --max_new_tokens 40 --device cpu"
    text = lambda *flags, **more: good(gpt_v3, use, *flags, **more)
    assert text("--seed 1") == text("--seed 1") != text("--seed 2")
    assert len({text("--top_k 1 --seed 1"), text("--top_k 1 --seed 2"), text("--temperature 0")}) == 1
    assert len(text("--prompt ''")) == 1 + 40 + 1 == len(text("--prompt ROMEO:", out=(out := Output()))) - 5
    calls = [entry for entry in out.calls if entry]
    assert calls[:2] == ["ROMEO:", "flush"] and calls[3:82:2] == ["flush"] * 40
    assert [*map(len, calls[2:82:2])] == [1] * 40
    unknown = call(gpt_v3, "--generate run.pt --device cpu --prompt a€")
    assert refused(unknown, "--prompt", "€") and len(unknown[2]) < 100

def test_several_texts_are_written_at_once(saved):
    use = "--generate run.pt --max_new_tokens 30 --prompt ROMEO: --device cpu --num_samples 3"
    *texts, rest = good(gpt_v3, use).split("\n" + "-" * 20 + "\n")
    assert rest == "" and [re.match("ROMEO:", text) and len(text) for text in texts] == [36] * 3

def test_finetuning_starts_anew_from_the_weights_and_the_characters_of_a_saved_model(saved):
    Path("backwards.txt").write_text(TEXT[::-1])
    finetune = "--init_from run.pt --data backwards.txt --batch_size 4 --max_iters 3 --eval_iters 2"
    out = good(gpt_v3, finetune, "--device cpu --optimizer muon --save new.pt --csv r.csv --max_new_tokens 0")
    (row,), old, new = rows("r.csv"), load("run.pt"), load("new.pt")
    first = float(re.search("step 0: train loss (.*?),", out)[1])
    adamw, muon = (each["param_groups"][0] for each in new["optimizers"])  # muon has a layer's four matrices
    assert len(muon["params"]) == 4 and (adamw["lr"], adamw["weight_decay"]) == (2 * muon["lr"], 0)
    assert new["chars"] == old["chars"] and new["step"] == 3 and row["n_embd"] == "16"
    assert "--init_from run.pt" in row["flags"] and "--max_iters 3" in row["flags"] and first < 4.1
    good(gpt_v3, "--resume new.pt --max_iters 5 --csv r.csv --device cpu --max_new_tokens 0")
    assert "--init_from run.pt" in rows("r.csv")[1]["flags"]
    Path("backwards.txt").write_text(TEXT + "é€")
    assert refused(call(gpt_v3, finetune, "--device cpu"), "--data backwards.txt", "é", "€")

def folder(name, train, val, meta=None):
    Path(name).mkdir(exist_ok=True)
    for file, data in {"train.bin": train, "val.bin": val, **({"meta.pkl": meta} if meta else {})}.items():
        Path(name, file).write_bytes(data)
    return f"--data {name}"

def ids(text, chars):
    return b"".join(chars.index(char).to_bytes(2, "little") for char in text)

def test_a_folder_of_nanogpt_trains_as_its_text_does_and_without_characters_has_gpt_2_s_tokens(monkeypatch):
    chars = sorted(set(TEXT))
    meta = pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {}})
    flags = folder("chars", ids(TEXT[:18000], chars), ids(TEXT[18000:], chars), meta)
    text, own = good(gpt_v3, QUICK), good(gpt_v3, QUICK, flags)
    assert re.sub(r"\d+\.\d+ ms.*", "", text) == re.sub(r"\d+\.\d+ ms.*", "", own)
    flags = folder("gpt2", ids(TEXT[:1000], chars), b"\x50\xc4" * 100)  # with 50256, the last of GPT-2's
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # not installed
    _, out, err = call(gpt_v3, QUICK, flags, "--save gpt2.pt --csv r.csv --max_iters 1 --max_new_tokens 5")
    assert re.search(r"\n0 (\d+ ){5}\n$", out) and rows("r.csv")[0]["data"] == "gpt2"
    assert "pip install tiktoken" in err and err.count("\n") == 1
    generate = "--generate gpt2.pt --max_new_tokens 3 --device cpu --prompt"
    assert re.fullmatch(r"7 50256 (\d+ ){3}\n", call(gpt_v3, generate, "'7 50256'")[1])
    assert call(gpt_v3, generate, "'7 x'")[0] == 2
    bpe = SimpleNamespace(encode=lambda text, **_: [len(word) for word in text.split()],
                          decode=lambda ids: " ".join("x" * (i % 9) for i in ids))
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=lambda name: bpe))
    assert re.fullmatch(r"xx xxx( x*){3}\n", good(gpt_v3, generate, "'ab abc'"))

def test_a_damaged_or_hostile_folder_is_refused():
    zeros, ab = b"\0" * 98, pickle.dumps({"itos": {0: "a", 1: "b"}})
    for train, val, meta, parts in [
            (zeros[1:], zeros, None, ["train.bin", "odd"]), (zeros, b"", None, ["val.bin"]),
            (zeros, zeros[:16], None, ["val.bin", "--block_size 8"]),
            (b"\1\0\0\0" * 49, zeros, None, ["train.bin", "uint32"]),
            (b"\xff" * 98, zeros, None, ["train.bin", "65535"]), (b"\2\0" * 49, zeros, ab, ["id 2", "1"]),
            (zeros, zeros, pickle.dumps({"itos": print}), ["meta.pkl", "builtins.print"]),
            (zeros, zeros, pickle.dumps(7), ["meta.pkl", "itos"]),
            (zeros, zeros, pickle.dumps({"stoi": {"a": 0}}), ["meta.pkl", "itos"]),
 (zeros, zeros, b"words", ["meta.pkl"])]:
        assert refused(call(gpt_v3, QUICK, folder("f", train, val, meta)), "--data f", *parts), parts

@slow
@beside
def test_a_file_of_4_gb_is_not_read_into_memory(folder):
    (folder / "big").mkdir()
    for name, size in ("train.bin", 2**32), ("val.bin", 2**20):
        with open(folder / "big" / name, "wb") as file:
            file.truncate(size)  # sparse: zeros that take no room
    (folder / "big/meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "b"}}))
    code = f"""import resource, sys, torch; sys.path.insert(0, {str(ROOT)!r}); import gpt_v3
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = peak(); gpt_v3.train(gpt_v3.parse_args({words(QUICK, '--data big --max_iters 300 --batch_size 32')}))
assert peak() - before < 1, (before, peak())"""
    status, out, err = end(start(folder, "-c", shlex.quote(code)), 300)
    assert (status, err) == (0, "") and "final: " in out

# --- Several processes -----------------------------------------------------------------------------------
GLOO = f"{RUN} --optimizer adamw --dropout 0 --dtype float32 --batch_size 8 --learning_rate 1e-3"

@slow
@beside
def test_two_processes_equal_one_and_save_at_a_signal_what_one_goes_on_with(folder):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2", ROOT / "gpt_v3.py", GLOO
    whole = start(folder, *torchrun, "--save two.pt --csv two.csv --grad_accum 2")
    cut = start(folder, *torchrun, "--max_iters 100000 --eval_interval 50000 --save cut.pt --csv cut.csv")
    until(lambda: cut.stdout.readline().startswith("step 10 "), cut)
    cut.send_signal(signal.SIGTERM)
    (status, _, err), step = end(cut), load(folder / "cut.pt")["step"]
    assert status != 0 and step > 10 and rows(folder / "cut.csv") == []
    assert err.count(f"stopped at step {step}; --resume cut.pt continues it") == err.count("stopped at") == 1
    status, out, err = end(whole)
    assert status == 0 and "Warning" not in err and out.count("final: ") == 1
    def go_on():
        os.chdir(folder)
        good(gpt_v3, "--resume cut.pt --csv cut.csv --device cpu --max_iters", step + 3)
        assert load("cut.pt")["step"] == step + 3 and len(rows("cut.csv")) == len(rows("two.csv")) == 1
        good(gpt_v3, GLOO, "--save one.pt")
        one, two = (dict(load(f"{name}.pt")["model"]) for name in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5)
    return go_on

# --- The sweep -------------------------------------------------------------------------------------------
SAME = """--n_layer 1 --n_head 2 --n_embd 16 --batch_size 2 --block_size 8 --max_iters 2 --eval_interval 2
    --eval_iters 1 --device cpu --data input.txt"""  # which leaves gpt, gpt_v2 and three encodings

def sweep(folder, *flags, script=ROOT / "sweep.sh", env=()):
    """Start sweep.sh in a process group of its own, python3 being the one that runs the tests."""
    env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **dict(env)}
    env |= {key: os.environ[key] for key in os.environ if not re.match("SLURM|OMP|CUDA|JOBS|SAVE|PATH", key)}
    return subprocess.Popen(
        ["bash", script, *words(*flags)], env=env, cwd=folder, start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def test_the_sweep_is_the_56_runs_of_the_experiment(tmp_path):
    pattern = (r"python3 .*/(gpt\w*)\.py (?:--pe (\w+) )?--n_embd (\d+) --n_head (\d+) --n_layer (\d+) "
               r".*--once --max_new_tokens 0 \n")
    for flags, widths, depths in (("", (384, 768), (6, 8, 12)), ("--laptop", (96, 192), (3, 4, 6))):
        status, out, err = end(sweep(tmp_path, "--dry-run --csv new.csv", flags, "-- --seed 2"))
        grid = itertools.product(("gpt_v3",), ("randn", "sinpe", "rope"), widths, (6, 8, 12), depths)
        both = [(name, "", widths[0], 6, depths[0]) for name in ("gpt", "gpt_v2")]
        expected = sorted(tuple(map(str, run)) for run in [*both, *grid])
        assert (status, err) == (0, "") and sorted(re.findall(pattern, out)) == expected
        assert out.count("--seed 2") == len(expected) == 56
    out = end(sweep(tmp_path, "--dry-run --only 'n_embd 384'"))[1]
    assert out.count("\n") == 29 and not (tmp_path / "new.csv").exists()
    task = end(sweep(tmp_path, "--dry-run", env={"SLURM_ARRAY_TASK_ID": "55"}))[1]
    assert task.count("\n") == 1 and "--pe rope --n_embd 768 --n_head 12 --n_layer 12" in task
    assert "usage: " in end(sweep(tmp_path, "--help"))[1]

@pytest.mark.parametrize("flags,message", {
    "--frobnicate": "usage: ", "--csv": "usage: ", "--only nothing": "no such run",
    "--csv r.csv -- --data no.txt": "--data no.txt: ", "--csv r.csv -- --frobnicate": "--frobnicate"}.items())
def test_what_is_wrong_with_a_sweep_is_said_once(tmp_path, flags, message):
    status, out, err = end(sweep(tmp_path, flags))
    assert status == 2 and err.count(message) == 1 and "Traceback" not in err and "final" not in out
    assert "error: " not in err or err.count("\n") == 1

def test_a_sweep_runs_what_is_not_in_its_csv_and_says_what_failed(tmp_path):
    flags = f"--only 'n_head 6 --n_layer 6' --csv r.csv -- {SAME}"  # eight runs, five of them different
    status, out, err = end(sweep(tmp_path, flags, env={"JOBS": "1"}))
    assert (status, err) == (0, "") and out.count("start: ") == 8 and out.count(": final: train loss ") == 5
    assert out.count("nothing to do") == 3 and len(rows(tmp_path / "r.csv")) == 5
    assert end(sweep(tmp_path, flags))[1].count("nothing to do") == 8
    Path("input.txt").write_text(TEXT[1:])  # of the same name
    assert end(sweep(tmp_path, flags, env={"JOBS": "1"}))[1].count("nothing") == 3
    assert len(rows(tmp_path / "r.csv")) == 10

def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    case = f'case $1 in *gpt.py) echo broken >&2; exit 7;; *) exec {sys.executable} "$@";; esac'
    (tmp_path / "python3").write_text(f"#!/bin/sh\n{case}\n")
    (tmp_path / "python3").chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    status, out, err = end(sweep(tmp_path, "--only 'gpt.py\\|gpt_v2' --csv r.csv --", SAME, env=env))
    assert (status, err) == (1, "broken\n1 runs failed; rerun to continue\n")
    assert [row["experiment"] for row in rows(tmp_path / "r.csv")] == ["gpt_v2"] and out.count("start") == 2

@slow
def test_ctrl_c_ends_a_sweep_and_its_runs_and_a_saved_one_continues(tmp_path):
    long = ["--only 'rope.*768.*12.*12' --csv r.csv --", SAME, "--max_iters 1000000 --eval_interval 1000000"]
    process = sweep(tmp_path, *long, env={"SAVE": "kept"})
    until(lambda: list(tmp_path.glob("kept/*.pt")), process)
    os.killpg(process.pid, signal.SIGINT)
    status, out, err = end(process, 60)  # the pipes close when the runs have ended
    assert status == 130 and "Traceback" not in err and "continues it" in err
    assert rows(tmp_path / "r.csv") == []
    assert subprocess.run(["pgrep", "-r", "R,S,D", "-g", str(process.pid)], capture_output=True).stdout == b""
    assert "--resume kept/" in end(sweep(tmp_path, "--dry-run", *long, env={"SAVE": "kept"}))[1]

# --- The report ------------------------------------------------------------------------------------------
SEED_CSV = ROOT / "results/seed.csv"

@pytest.fixture
def report(tmp_path):
    """The report and the published losses in results/, with a README.md of all tables there and above."""
    (tmp_path / "results").mkdir()
    for name in ("report.py", "seed.csv", "choices.csv"):
        shutil.copy(ROOT / "results" / name, tmp_path / "results")
    spec = importlib.util.spec_from_file_location("report", tmp_path / "results/report.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    blocks = "".join(f"<!-- report {name} -->\nold\n<!-- /report -->\n" for name in module.TABLES)
    for page in ("results/README.md", "README.md"):
        Path(page).write_text(f"top\n{blocks}end\n")
    return module

def published(name, change=lambda loss, seed: loss, seeds=(1337,), small=True, most=56, **cells):
    """A CSV of the published runs, or of the small ones that stand for them, with changed losses."""
    made, path = [], Path("results", name)
    for row, seed in ((row, seed) for seed in seeds for row in rows(SEED_CSV)[:most]):
        flags = row["flags"].replace("1337", str(seed)).replace("256", "64" if small else "256")
        row |= {loss: change(float(row[loss]), seed) for loss in ("train_loss", "val_loss") if row[loss]}
        row |= {"flags": flags, "curve": "0:4.2:4.2 300:2.5:2.6 600:2.0:2.4 900:1.5:2.7"} | cells
        shrunk = {"n_embd": int(row["n_embd"]) // 4, "n_layer": int(row["n_layer"]) // 2}
        made.append(row | shrunk if small else row)
    gpt.append_row(path)
    for row in made:
        gpt.append_row(path, row)
    return path

def table(report, name, path):
    text = report.TABLES[name](report.sweep(SEED_CSV), report.sweep(path)).split("\n\n")[0]
    return {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in text.split("\n")[2:])}

@beside
def test_the_pages_and_figures_are_what_the_csvs_give(folder):
    assert "<!-- report findings -->" in (ROOT / "results/README.md").read_text()
    assert end(start(folder, ROOT / "results/report.py", "--check")) == (0, "", "")

def test_a_report_writes_both_pages_and_check_finds_each_difference(report):
    path = published("laptop.csv")
    assert call(report) == (0, "", f"{path.resolve()}: 45 of 56 runs\n")
    made = files("results") | files()
    for text in (Path(page).read_text() for page in ("README.md", "results/README.md")):
        assert re.fullmatch(r"top\n(?s:.*--attn mla .* [|] 320 [|]\n.*)end\n", text) and "\nold\n" not in text
    assert call(report, "--check results/choices.csv") == (0, "", "") and files("results") | files() == made
    for changed in map(Path, ("README.md", "results/README.md", "results/losses.png", "results/curves.png")):
        changed.write_bytes(re.sub(rb"[0-9a-f]{64}|reproduced", b"", made[changed]))  # of a figure the hash
        assert refused(call(report, "--check"), f"{changed.resolve()} is not what ", status=1)
        changed.write_bytes(made[changed])
    path.write_text(path.read_text().replace("600:2.0", "600:1.9"))  # of which no table knows
    assert refused(call(report, "--check"), "losses.png is not what ", status=1)

@pytest.mark.parametrize("most", [0, 1, 3, 45])
def test_any_part_of_another_sweep_is_printed_and_drawn_beside_its_csv(report, most):
    before, path = files(), published("my.csv", most=most, small=False)
    status, out, err = call(report, path)
    assert (status, err) == (0, f"{path}: {most} of 56 runs\n") and f"{most} of 56 runs, {most} rows" in out
    assert re.findall("## (.+)", out) == list(report.TABLES)[:-1]  # not the choices
    names = ["my_curves.png", "my_losses.png"] if most > 2 else ["my_losses.png"] if most else []
    assert sorted(file.name for file in Path("results").glob("*.png")) == names and files() == before
    assert call(report, path, "--check") == (0, "", "")

def test_a_finding_is_reproduced_or_not_or_within_the_spread_of_seeds(report):
    found, wide = table(report, "findings", published("same.csv")), "n_embd 768 has the lowest train loss"
    assert found[wide] == ["16 of 16, +0.545"] * 2 + ["reproduced"]
    assert found["n_head moves the val loss less than the other factors"][0] == "3 of 3, +0.353"
    assert {line[-1] for line in found.values()} == {"reproduced"}
    found = table(report, "findings", published("turned.csv", lambda loss, seed: 4 - loss))
    assert found[wide][1:] == ["0 of 16, -0.545", "not reproduced"]
    chance = lambda loss, seed: loss + 0.1 * seed  # the difference between two seeds has the spread 0.1
    found = table(report, "findings", published("two.csv", chance, seeds=(1, 2)))
    assert [found[name][-1] for name in (wide, "pe_type rope has the lowest train loss, n_embd 768")] == [
        "reproduced", "within the spread of seeds"]

def test_the_order_of_rows_and_equal_rows_change_nothing(report):
    one = published("one.csv", lambda loss, seed: loss + seed, seeds=(1, 2))
    header, *lines = one.read_text().splitlines(keepends=True)
    Path("two.csv").write_text(header + "".join(random.Random(0).sample(lines * 2, len(lines) * 2)))
    assert report.sweep(one) == report.sweep("two.csv")
    assert "--- |\n| gpt_v3 | sinpe | 384 (96) | 8 | 6 (3) | 1.506 | 3.006 ± 0.707 " in call(report, one)[1]

@pytest.mark.parametrize("old,new,message", [
    (r"\n\Z", "", "line 4 is damaged or cut off"), ("2.7\n", "2", "line 2 is"), (",384,", ",wide,", "line 2"),
    ("randn", "huh", "line 4 is"), ("300:2.5:2.6", "300:2.5", "line 2"), ("--batch", '"--batch', "line 2 is"),
    (" 64 ", " 32 ", "rows differ in --batch_size (32, 64); a report is of one setting"),
    ("3747689809", "1", "rows differ in text (1, 3747689809)"), ("val_loss", "loss", "it is not a CSV of ")])
def test_a_report_refuses_what_it_cannot_read(report, old, new, message):
    path = published("my.csv", most=3, small=False)
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    assert refused(call(report, path), f"{path}: {message}") and refused(call(report, "no.csv"), "[Errno 2]")

def test_figures_have_eight_lines_a_panel_at_most_and_claim_what_is_so(report):
    theirs, same, other = map(report.sweep, (SEED_CSV, published("same.csv"), published(
        "other.csv", lambda loss, seed: 4 - loss if loss > 1.2 else loss, curve="300:2:3 600:1:2")))
    for ours, claimed in ((same, True), (other, False)):
        losses, curves = report.losses_figure(theirs, ours), report.curves_figure(theirs, ours)
        assert curves.get_suptitle().startswith(f"In {9 * claimed} of 9 runs the val loss turns up")
        assert ("the worse it predicts" in losses.get_suptitle()) == claimed
        assert [len(axes.lines) for axes in losses.axes] == [40, 40]
        assert all(len(axes.lines) <= 8 and axes.lines[0].get_xdata()[0] == 300 for axes in curves.axes)
        assert "channels wide: 384 (ours 96)" in [text.get_text() for text in losses.legends[0].get_texts()]

# --- The benchmark ---------------------------------------------------------------------------------------
SMALL = "--T 16 --n_head 2 --n_embd 32 --batch_size 2 --n_layer 2 --rounds 1 --csv a.csv"

@pytest.mark.parametrize("flags,part", [
    ("--T 256 x", "x"), ("--T 1", "--T must be at least 2"), ("--T", "--T"), ("--n_head 6 5", "--n_head 5"),
    ("--dtype float16", "float16"), ("--dropout 1", "--dropout: must be"), ("--rounds 0", "--rounds"),
    ("--batch_size 0", "--batch_size: must be"), ("--device tpu", "tpu"), ("--csv no/a.csv", "no/a.csv"),
    ("--csv .", ". is a folder"), ("--plot no/a.png", "no/a.png"), ("--head 6", "--head"), ("extra", "extra"),
    ("--step --data no.txt", "no.txt"), ("--step --T 16 5000", "5000"), ("--csv b.csv", "pip install -r")])
def test_a_wrong_flag_of_the_benchmark_is_one_line_before_anything_is_measured(flags, part, monkeypatch):
    monkeypatch.setattr(bench, "milliseconds", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    before, result = files(), call(bench, flags, "--device cpu" * ("--device" not in flags))
    assert refused(result, part) and result[1] == "" and files() == before

nothing = lambda x: x - x.detach()  # but a gradient
WRONG = {
    "not causal": lambda q, k, v, mask, p: bench.manual(q, k, v, torch.ones_like(mask), p),
    "drops 3/16": lambda q, k, v, mask, p: bench.manual(q, k, v, mask, 3 / 16 if p else 0.0),
    "not finite": lambda *args: bench.manual(*args) * torch.nan,
    "twice dq": lambda q, k, v, mask, p: bench.manual(q + nothing(q), k, v, mask, p),
    "dropout, and dk has a sum": lambda q, k, v, mask, p: bench.manual(q, k, v, mask, p) + p * nothing(k),
    "dropout, and another for dv": lambda q, k, v, mask, p: bench.manual(q, k, v.detach(), mask, p) + nothing(
        bench.manual(q.detach(), k.detach(), v, mask, p))}

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_tells_wrong_attention_from_right(wrong, dtype):
    torch.manual_seed(0)
    *qkv, grad = torch.randn(4, 4, 6, 256, 64, dtype=dtype)
    rest = *(x.requires_grad_() for x in qkv), grad, torch.tril(torch.ones(256, 256, dtype=torch.bool))
    with pytest.raises(ArithmeticError, match="wrong: the error is"):
        bench.check(WRONG[wrong], *rest, 0.2, True)
    right = WRONG[wrong] if wrong.startswith("drop") else bench.manual
    assert bench.check(right, *rest, 0.0, True) < 0.5 and bench.check(bench.manual, *rest, 0.2, True) < 0.5

@pytest.mark.parametrize("device,dtype,dropout", [
    *(pytest.param("cpu", *how, marks=slow) for how in (("float32", 0.2), ("bfloat16", 0.0))),
    *(pytest.param("cuda", dtype, p, marks=cuda) for dtype in ("float32", "bfloat16") for p in (0.0, 0.2))])
def test_every_contender_that_runs_agrees_with_the_manual_one(device, dtype, dropout):
    flags = words("--batch_size 2 --device", device, "--dtype", dtype, "--dropout", dropout)
    done = {row["contender"] for row in bench.time_attention(flags, 1) if not row["note"]}
    flash = dtype == "bfloat16" if device == "cuda" else not dropout
    kernel = device == "cuda" and dtype == "bfloat16" and not dropout
    assert done - {"SDPA cuDNN"} == {  # where it is wrong, that is no fault of ours
        "manual", "manual, compiled", "SDPA math", "SDPA math, bf16 sums", *["SDPA flash"] * flash,
        *["SDPA efficient"] * (device == "cuda"), *["Triton, this file"] * kernel}

def test_peak_memory_is_what_a_call_holds_at_most():
    call = lambda: [torch.empty(3 << 18).numel(), torch.empty(1 << 18), torch.empty(1 << 18)]
    assert bench.peak_mib(call, "cpu") == 3  # MiB, of floats that are freed at once

def test_the_benchmark_of_attention_is_a_table_a_csv_and_a_figure(monkeypatch):
    def large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\n:(")
    flash = bench.contenders("cpu")["SDPA flash"]
    monkeypatch.setattr(bench, "contenders", lambda device: {
        "manual": bench.manual, "wrong": WRONG["not causal"], "large": large, "flash": flash})
    _, out, err = call(bench, SMALL, "--device cpu --T 16 32 --dtype float32 --dropout 0.2 --plot a.png")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"]
    right = [row for row in rows("a.csv") if not row["note"]]
    assert lines[0] == "block_size case contender ms ms_q1 ms_q3 peak_mib matmul_share".split()
    for line, row in zip(lines[2:], right, strict=True):
        assert line[:3] == [row["block_size"], row["case"], "manual"]
        assert float(row["ms_q1"]) <= float(row["ms"]) <= float(row["ms_q3"])
        assert float(line[3]) == pytest.approx(float(row["ms"]), rel=1e-3)
        assert f"manual, {row['case']}: {float(row['ms']):.4g} ms\n" in err  # said as it is measured
    notes = dict(line[2:].split(": ", 1) for line in out.splitlines() if line[:1] == "*")
    assert len(notes) == 6 and notes["large, forward"] == "CUDA out of memory. Tried to allocate 1 TiB"
    assert "wrong: the error is" in notes["wrong, forward"] and "non-zero dropout" in notes["flash, forward"]
    assert len(rows("a.csv")) == 16 and Path("a.png").read_bytes().startswith(b"\x89PNG")

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_a_step_is_timed_on_every_rung(device):
    _, out, _ = call(bench, SMALL, "--step --dtype bfloat16 --plot s.png --device", device)
    rungs = list(bench.RUNGS | bench.ALTERNATIVES)[:4 if device == "cpu" else None]
    cases = [(row["case"], row["contender"]) for row in rows("a.csv") if float(row["ms"]) > 0]
    assert cases == list(itertools.product(rungs, ("gpt", "gpt_v2", "gpt_v3")))
    assert "| first_step_s" in out.replace("  ", "") and Path("s.png").exists()

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@each_script
def test_the_step_is_that_of_the_script_and_a_graph_of_it_goes_on_where_it_was(script, device):
    flags = words("--device", device, "--dropout 0 --no-compile" * (device == "cuda"))
    config = script.parse_args(words(QUICK, *flags))
    torch.manual_seed(config.seed)
    model, step = bench.training_step(script, config, fused=True)
    losses = [step().item() for _ in range(config.max_iters)]
    torch.testing.assert_close(dict(model.state_dict()), dict(train(script, *flags).state_dict()))
    if device == "cuda":
        torch.manual_seed(config.seed)
        _, replay = bench.training_step(script, config, fused=True, graph="step")  # after three steps
        assert abs(replay().item() - losses[3]) < 1e-3 < abs(replay().item() - losses[3])

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
@beside
def test_the_triton_kernel_is_attention_in_triton_s_interpreter(folder):
    pytest.importorskip("triton")
    status, out, err = end(start(folder, "-c", shlex.quote(INTERPRET), env=dict(
        TRITON_INTERPRET=1, PYTHONPATH=ROOT)))
    assert status == 0 and len(out.split()) == 4, err

# --- README ----------------------------------------------------------------------------------------------
def test_every_command_in_the_readme_is_understood(saved):
    readme, names = (ROOT / "README.md").read_text(), set()
    parsers = {f"{script.__name__}.py": script.parse_args for script in SCRIPTS}
    readme = readme.replace("\\\n", " ").replace("$T", "512")
    for block in re.findall(r"^```\w*\n(.*?)^```", readme, re.M | re.S):
        for name, flags in re.findall(r"(?:python3?|bash|torchrun.*) (\S+\.(?:py|sh))([^|&#;\n]*)", block):
            names.add(name)
            flags = ["cpu" if word == "cuda" else word for word in words(flags)]
            for flag, file in zip(flags, flags[1:]):
                if flag in ("--resume", "--generate"):
                    Path(file).write_bytes(saved)
                elif flag == "--save" and os.path.exists(file):
                    os.remove(file)
            cut = flags.index("--") if "--" in flags else len(flags)
            assert all(flag in (ROOT / name).read_text() for flag in flags[:cut] if flag[:2] == "--")
            parsers.get(name, lambda _: None)(flags)
            gpt_v3.parse_args(flags[cut + 1:])
    assert names >= {"gpt_v3.py", "sweep.sh"}

def test_the_readme_has_the_literal_diff():
    one, two = ((ROOT / name).read_text().splitlines() for name in ("gpt.py", "gpt_v2.py"))
    lines = difflib.unified_diff(one, two, "gpt.py", "gpt_v2.py", lineterm="", n=0)
    shown = (ROOT / "README.md").read_text().split("```diff\n")[1].split("```")[0]
    assert shown == "\n".join(lines) + "\n"
