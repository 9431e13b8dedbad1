"""Why attention is fused, measured: attention by hand and by SDPA on this machine, as a table in Markdown.

    python bench.py                                                          # two minutes
    python bench.py --T 256,512,1024,2048 --n_head 6 --plot attention.png    # how time and memory grow
    python bench.py --step    # a training step of the three scripts, from eager float32 to all that helps
"""
import argparse, csv, itertools, json, math, os, platform, statistics, sys, tempfile, timeit, warnings

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory is talkative

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

import gpt, gpt_v2, gpt_v3
from gpt import fail, number

try:
    import triton, triton.testing
    import triton.language as tl
except ImportError:  # macOS, Windows
    triton = None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# --- Contenders: functions of q, k, v (B, H, T, hs), mask (T, T) and dropout -> (B, H, T, hs) --------------

def manual(q, k, v, mask, dropout):
    """The arithmetic of Head in gpt.py, for all heads in one batch."""
    scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, H, T, hs) @ (B, H, hs, T) -> (B, H, T, T)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)  # (B, H, T, T)
    return weights @ v  # (B, H, T, T) @ (B, H, T, hs) -> (B, H, T, hs)


def sdpa(backend, bf16_sums=False):
    """F.scaled_dot_product_attention with one of its backends.

    The math backend turns bfloat16 into float32 first, unless bf16_sums: the scripts want that on a CPU.
    """
    def contender(q, k, v, mask, dropout):
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(bf16_sums)  # not of CUDA alone
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return contender


if triton:
    @triton.jit
    def flash_kernel(Q, K, V, OUT, batch_stride, head_stride, time_stride, T, H, scale,
                     hs: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """M rows of softmax(Q K^T scale) V, of one head of one sequence, in one kernel: that is "fused".

        By hand, the scores (T, T) go out to memory and come back for the mask, for the softmax, for the
        dropout and for the product with V. Here they exist on the chip only, N keys at a time, and nothing
        but the result (M, hs) is written. A softmax needs the maximum and the sum of a whole row, though:
        both are kept for the keys seen so far, and what was summed under an older maximum is scaled down to
        the new one. That online softmax is Milakov & Gimelshein's (2018), attention as such a kernel is Dao
        et al.'s (2022), with the rows in parallel and the keys in the loop Dao's (2023, FlashAttention-2).

        Q, K and V share their strides, counted in elements, the last one being 1; OUT (B, T, H, hs) is
        contiguous. scale includes log2(e), as a GPU computes 2^x. D is hs rounded up to a power of two.
        """
        block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see the most keys: they start first
        head = tl.program_id(1).to(tl.int64)  # of all B H of them
        rows, dims = block * M + tl.arange(0, M), tl.arange(0, D)
        inside = (rows[:, None] < T) & (dims < hs)  # all else is padding: read as zeros, never written
        start = head // H * batch_stride + head % H * head_stride
        q = tl.load(Q + start + rows[:, None] * time_stride + dims, mask=inside, other=0.0)  # (M, D)

        largest = tl.full((M,), float("-inf"), tl.float32)  # the maximum of each row's scores so far
        total = tl.zeros((M,), tl.float32)  # sum of 2^(score - largest) so far
        out = tl.zeros((M, D), tl.float32)  # sum of 2^(score - largest) v so far
        for first in range(0, tl.minimum((block + 1) * M, T), N):  # causal: no key after the last row
            keys = first + tl.arange(0, N)
            there = (keys[:, None] < T) & (dims < hs)
            k = tl.load(K + start + keys[:, None] * time_stride + dims, mask=there, other=0.0)  # (N, D)
            v = tl.load(V + start + keys[:, None] * time_stride + dims, mask=there, other=0.0)  # (N, D)
            scores = tl.dot(q, tl.trans(k)) * scale  # (M, N): bfloat16 in, float32 out
            scores = tl.where(rows[:, None] >= keys, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, 1))
            shrink = tl.exp2(largest - larger)
            weights = tl.exp2(scores - larger[:, None])
            total = total * shrink + tl.sum(weights, 1)
            out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
            largest = larger
        to = (head // H * T + rows[:, None]) * (H * hs) + head % H * hs + dims
        tl.store(OUT + to, (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside)


def triton_flash(q, k, v, mask, dropout):
    """The kernel above: bfloat16, any T, hs from 16 to 128; forward only and without dropout."""
    B, H, T, hs = q.shape
    for reason, applies in {
            "Triton is not installed": triton is None,
            "on a GPU only": triton and not q.is_cuda and isinstance(flash_kernel, triton.JITFunction),
            "forward only": torch.is_grad_enabled() and q.requires_grad,
            "without dropout only": dropout > 0,
            "bfloat16 only": q.dtype != torch.bfloat16,
            "head_dim 16 to 128 only": not 16 <= hs <= 128}.items():
        if applies:
            raise NotImplementedError(reason)
    if q.stride(-1) != 1 or not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = q.new_empty(B, T, H, hs)  # heads side by side, as the next layer wants them
    D = triton.next_power_of_2(hs)
    flash_kernel[triton.cdiv(T, 128), B * H](
        q, k, v, out, *q.stride()[:3], T, H, hs ** -0.5 * math.log2(math.e), hs=hs, D=D, M=128, N=64,
        num_warps=8 if D == 128 else 4, num_stages=2)
    return out.transpose(1, 2)


CONTENDERS = {
    "manual": manual,
    "manual, compiled": torch.compile(manual, dynamic=False, fullgraph=True),
    "SDPA math": sdpa(SDPBackend.MATH),
    "SDPA math, bf16 sums": sdpa(SDPBackend.MATH, bf16_sums=True),
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "Triton, this file": triton_flash,
}


def draw(B, H, T, hs, dtype, device):
    """New q, k, v (B, H, T, hs), views of one projection as in gpt_v3.py, and a gradient of the output."""
    qkv, grad = torch.randn(B, T, 3, H, hs, device=device), torch.randn(B, T, H, hs, device=device)
    q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4)
    return *(x.detach().requires_grad_() for x in (q, k, v)), grad.to(dtype).transpose(1, 2)


def attend(function, q, k, v, grad, mask, dropout, backward):
    """One pass of a contender -> (out,), or with backward (out, dq, dk, dv)."""
    with torch.set_grad_enabled(backward):
        out = function(q, k, v, mask, dropout)
        return (out, *torch.autograd.grad(out, (q, k, v), grad)) if backward else (out,)


# --- Correct first ---------------------------------------------------------------------------------------

def max_error(function, q, k, v, grad, mask, dropout, backward):
    """The largest error of output and gradients, each relative to its largest true value.

    The truth is manual in float64, for the first and the last sequence. With dropout there is no one truth,
    but every draw has to keep three laws; breaking the first raises ArithmeticError, the others are errors:
    * the output's squared distance from that without dropout is p/(1-p) sum_j weights_j^2 v_j^2 on average;
    * output and dv come from the same weights W after dropout: out = W v, dv = W^T grad, and so
      sum_t dv v = sum_t grad out;
    * the same shift of all keys changes nothing, sum_t dk = 0, if both passes dropped the same weights.
    """
    ends = [0, -1]
    exact = [x[ends].detach().double().requires_grad_() for x in (q, k, v)] + [grad[ends].double()]
    true = attend(manual, *exact, mask, 0.0, backward)
    got = [x[ends].double() for x in attend(function, q, k, v, grad, mask, 0.0, backward)]
    errors = [(x - y).abs().max() / y.abs().max() for x, y in zip(got, true)]
    if dropout and torch.stack(errors).max() < 0.1:  # else it is wrong already
        got = [x[ends].double() for x in attend(function, q, k, v, grad, mask, dropout, backward)]
        q, k, v, grad = (x.detach() for x in exact)
        identity = torch.eye(len(mask), dtype=q.dtype, device=q.device).expand(*q.shape[:2], -1, -1)
        variance = manual(q, k, identity, mask, 0.0) ** 2 @ v ** 2  # (B, H, T, hs), times p/(1-p)
        odds = ((got[0] - true[0].detach()) ** 2 / variance).mean().item()
        if not abs(odds * (1 - dropout) / dropout - 1) < 2.5 * (2 / q[..., 0].numel()) ** 0.5:
            raise ArithmeticError(f"wrong (drops {odds / (1 + odds):.3f}, not {dropout})")
        if backward:
            out, _, dk, dv = got
            errors += [(dv * v - grad * out).sum(-2).norm() / (grad * out).norm(),
                       dk.sum(-2).norm() / dk.norm()]
    return torch.stack(errors).max().item()  # nan if one is


def tolerance(dtype, device):
    """The max_error that rounding explains: bfloat16 keeps 8 bits, float32 24, or 11 as TF32 on a GPU."""
    return 8 * 2.0 ** -(8 if dtype == torch.bfloat16 else 11 if device.type == "cuda" else 20)


def attempt(work):
    """work() and "", or None and in a few words the reason why not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return work(), ""
        except Exception as error:  # of any kind: from a kernel, a compiler, a driver
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            if gpt.out_of_memory(error):
                why = "out of memory"
    if why.startswith(("No available kernel", "No viable backend")):  # SDPA's reasons are warnings
        reasons = [str(warning.message).split(" (Triggered")[0] for warning in caught]
        reasons = [text for text in reasons if "not used because" not in text and "disabled" not in text]
        why = reasons[0] if reasons else "no such kernel here"
    return None, why.replace("|", "/").rstrip(".")[:80]


# --- Then fast -------------------------------------------------------------------------------------------

def clock(call, device):
    """Milliseconds of single calls after a warm-up, for a tenth of a second."""
    if device.type == "cuda" and triton:  # do_bench also empties the L2 cache before each call
        return triton.testing.do_bench(call, warmup=25, rep=100, return_mode="all")
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return [1e3 * seconds for seconds in timer.blocked_autorange(min_run_time=0.1).times]


def peak_mib(call, device):
    """MiB allocated at the peak of a call, its results included, what was there before not."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        with open(f"{folder}/trace.json", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]") / 2**20


def matmul_rates(device):
    """{dtype: FLOP/s} of a product of two square matrices: what this device can do."""
    n, rates = 8192 if device.type == "cuda" else 2048, {}
    for name, dtype in DTYPES.items():
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        times = [ms for _ in range(5) for ms in clock(lambda: a @ b, device)]
        rates[name] = 2e3 * n**3 / statistics.median(times)
    return rates


def take_turns(rows, calls, rates, args, new_round=lambda: None):
    """Time calls in turn, round by round, so that a disturbance hits them all, and complete their rows.

    A row is a dict with flops, dtype and note; with a note it is left out, if it fails here it gets one.
    """
    times = [[] for _ in rows]
    for _ in range(args.rounds):
        new_round()
        for row, call, ms in zip(rows, calls, times):
            if not row["note"]:
                more, row["note"] = attempt(lambda: clock(call, args.device))
                ms += more or []
    for row, ms in zip(rows, times):
        flops = row.pop("flops")
        if not row["note"]:
            low, median, high = statistics.quantiles(ms * 2, n=4)  # twice: there may be one alone
            row.update(n=len(ms), ms=median, ms_q1=low, ms_q3=high, tflops=flops / median / 1e9,
                       matmul_share=1e3 * flops / median / rates[row["dtype"]])
    return rows


def attention_rows(T, n_head, dtype, dropout, rates, args):
    """Check and time all contenders in one configuration -> a dict for each one's each pass.

    FLOPs as Dao (2023) counts: 4 T^2 hs a head, half of it as causal, 3.5 times as much with the backward.
    """
    B, hs = args.batch_size, args.n_embd // n_head
    mask = torch.tril(torch.ones(T, T, dtype=torch.bool, device=args.device))
    torch.compiler.reset()  # to compile for this configuration alone
    rows, calls, inputs = [], [], []

    def new_inputs():
        inputs[:] = draw(B, n_head, T, hs, DTYPES[dtype], args.device)

    def check(function, backward):
        error = max_error(function, *inputs, mask, dropout, backward)
        if not error < tolerance(DTYPES[dtype], args.device):
            raise ArithmeticError(f"wrong (max error {error:.2g})")
        return peak_mib(calls[-1], args.device)

    new_inputs()
    for (name, function), backward in itertools.product(CONTENDERS.items(), (False, True)):
        calls.append(lambda f=function, backward=backward: attend(f, *inputs, mask, dropout, backward))
        peak, note = attempt(lambda: check(function, backward))
        rows.append({"T": T, "batch_size": B, "n_head": n_head, "head_dim": hs, "dtype": dtype,
                     "dropout": dropout, "attention": name, "backward": backward, "peak_mib": peak,
                     "note": note, "flops": (7 if backward else 2) * B * n_head * T * T * hs})
    return take_turns(rows, calls, rates, args, new_inputs)


# --- A training step -------------------------------------------------------------------------------------

RUNGS = {  # name: dtype, mode of compile, whether AdamW is one fused kernel
    "eager float32": ("float32", None, False),
    "+ bfloat16": ("bfloat16", None, False),
    "+ compile": ("bfloat16", "default", False),
    "+ fused AdamW": ("bfloat16", "default", True),
    "+ CUDA graphs": ("bfloat16", "reduce-overhead", True),
}


def step_rows(rates, args):
    """Time one training step of each script on each rung of the ladder -> a dict for each.

    FLOPs of a token: 6 for each weight of a Linear, and 6 T n_embd for the causal attention of each layer.
    """
    torch.compiler.config.force_disable_caches = True  # the first step as on a machine that never compiled it
    rows, calls = [], []
    for script, (rung, (dtype, mode, fused)) in itertools.product((gpt, gpt_v2, gpt_v3), RUNGS.items()):
        if mode == "reduce-overhead" and args.device.type != "cuda":
            continue
        config = script.parse_args(args.script_flags)
        splits, chars = script.load_data(config)
        config.vocab_size, config.dtype = len(chars), dtype
        batches = torch.Generator(config.device).manual_seed(config.seed)
        if rung != "+ fused AdamW":  # which goes on with the model that is compiled already
            model = script.GPT(config).to(config.device)
            if mode == "default":
                script.compile_blocks(model, config)
            for block in model.blocks if mode == "reduce-overhead" else ():
                block.compile(mode=mode)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=fused)

        def step(script=script, config=config, data=splits["train"], batches=batches, model=model,
                 optimizer=optimizer):
            torch.backends.cuda.enable_flash_sdp(True)
            if script is gpt_v3:
                script.choose_sdpa(config)
            torch.compiler.cudagraph_mark_step_begin()
            x, y = script.get_batch(data, config, batches)
            with script.autocast(config):
                _, loss = model(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # at the end: so gradients count as memory of the step
            return loss.detach()

        seconds, note = attempt(lambda: timeit.timeit(lambda: step().item(), number=1))
        peak, note = (None, note) if note else attempt(lambda: peak_mib(step, config.device))
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        tokens = config.batch_size * config.block_size
        shape = {name: getattr(config, name) for name in
                 ("batch_size", "block_size", "n_embd", "n_head", "n_layer", "dropout")}
        rows.append(shape | {
            "script": model.experiment, "rung": rung, "dtype": dtype, "peak_mib": peak, "note": note,
            "first_step_s": None if rung == "+ fused AdamW" else seconds,
            "flops": 6 * tokens * (linear + config.n_layer * config.block_size * config.n_embd)})
        calls.append(step)
    for row in take_turns(rows, calls, rates, args):
        if not row["note"]:
            row["tokens_per_s"] = 1e3 * row["batch_size"] * row["block_size"] / row["ms"]
    return rows


# --- Results ---------------------------------------------------------------------------------------------

def cells(row):
    """Of a row: ms (its quartiles), TFLOP/s (as share of the matmul rate), MiB; or the reason why not."""
    if row["note"]:
        return [row["note"], "", ""]
    return [cell.format(**row) for cell in (
        "{ms:.3g} ({ms_q1:.3g} to {ms_q3:.3g})", "{tflops:.2g} ({matmul_share:.0%})", "{peak_mib:.1f}")]


def table(rows):
    """The lines of a table of attention_rows or step_rows in Markdown, the header first."""
    if "rung" in rows[0]:
        yield "script", "step", "ms", "TFLOP/s", "MiB", "tokens/s", "first step, s"
        for row in rows:
            first = row["first_step_s"]
            yield (row["script"], row["rung"], *cells(row), f"{row.get('tokens_per_s', 0):,.0f}",
                   "as above" if first is None else f"{first:.1f}")
        return
    yield ("T", "heads x dim", "dtype", "dropout", "attention", "forward, ms", "TFLOP/s", "MiB",
           "forward + backward, ms", "TFLOP/s", "MiB")
    ran = {row["attention"] for row in rows if not row["note"]}
    for row, back in zip(rows[::2], rows[1::2]):
        if row["attention"] in ran:
            yield (row["T"], f"{row['n_head']} x {row['head_dim']}", row["dtype"], row["dropout"],
                   row["attention"], *cells(row), *cells(back))
    for name, note in {row["attention"]: row["note"] for row in rows if row["attention"] not in ran}.items():
        yield "all", "all", "all", "all", name, note, "", "", note, "", ""  # never ran: one line will do


def plot(path, rows):
    """Draw time and memory against T, both on logarithmic axes, a column a configuration, into a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def column(row):
        return "{n_head} heads x {head_dim}, {dtype}, dropout {dropout:g}".format(**row)

    columns = list(dict.fromkeys(map(column, rows)))
    figure, axes = pyplot.subplots(2, len(columns), figsize=(4 + 4 * len(columns), 7), sharex=True,
                                   sharey="row", squeeze=False, layout="constrained")
    for (i, title), (j, (key, label)) in itertools.product(
            enumerate(columns), enumerate({"ms": "ms", "peak_mib": "MiB at the peak"}.items())):
        for color, name in enumerate(CONTENDERS):
            for backward, style, suffix in ((False, ":", ", forward"), (True, "-", ", forward + backward")):
                line = [(row["T"], row[key]) for row in rows if not row["note"] and column(row) == title
                        and (row["attention"], row["backward"]) == (name, backward)]
                if line:
                    axes[j, i].loglog(*zip(*line), style, marker=".", color=f"C{color}", label=name + suffix)
        axes[j, i].set(xlabel="T", ylabel=label, title=title)
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


# --- Flags -----------------------------------------------------------------------------------------------

def several(parse):
    """An argparse type: one value or more, with commas between."""
    def parse_all(text):
        return [parse(part) for part in text.split(",")]
    parse_all.__name__ = parse.__name__
    return parse_all


def parse_args(argv):
    """The flags in argv as a Namespace, checked; with --step, script_flags are what the scripts get."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: fail(f"{message}; --help lists the flags and what they take")
    flag, count = parser.add_argument, number(int, 1)
    flag("--step", action="store_true", help="time a training step instead; then the flags are --rounds, "
         "--csv and those of gpt.py, with --batch_size 4 by default on a CPU")
    flag("--rounds", type=count, default=5, help="turns of each contender, of a tenth of a second or more")
    flag("--csv", help="write all numbers into this file")
    if "--step" in argv and not {"-h", "--help"} & set(argv):
        args, flags = parser.parse_known_args(argv)
        args.device, args.plot = gpt.parse_args(flags).device, None
        args.script_flags = ["--batch_size=4"] * (args.device.type == "cpu") + flags
    else:
        flag("--plot", help="draw time and memory against T into this file, a PNG")
        flag("--T", type=several(count), default=[256], help="sequence lengths, with commas between")
        flag("--n_head", type=several(count), default=[6, 8, 12], help="attention heads, likewise")
        flag("--n_embd", type=count, default=384, help="channels, a multiple of each --n_head")
        flag("--batch_size", type=count, help="sequences; None is 64 on a GPU, 4 on a CPU")
        flag("--dtype", type=several(str), default=list(DTYPES), help="with commas between")
        flag("--dropout", type=several(number(float, 0, 1)), default=[0.0, 0.2], help="likewise")
        flag("--device", default="auto", help="cpu, cuda, cuda:1; auto is cuda, else cpu")
        args = parser.parse_args(argv)
        for dtype in set(args.dtype) - set(DTYPES):
            fail(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
        for n_head in args.n_head:
            if args.n_embd % n_head:
                fail(f"--n_embd {args.n_embd} is not a multiple of --n_head {n_head}")
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        args.device = gpt.parse_args(["--device", auto if args.device == "auto" else args.device]).device
        args.batch_size = args.batch_size or (4 if args.device.type == "cpu" else 64)
    if args.device.type not in ("cpu", "cuda"):
        fail(f"--device {args.device} cannot be timed, only cpu and cuda can")
    for name, path in (("csv", args.csv), ("plot", args.plot)):
        try:
            if path:
                open(path, "ab").close()  # better now than in two minutes
            if name == "plot" and path:
                import matplotlib  # noqa: F401
        except (OSError, ImportError) as error:
            fail(f"--{name} {path}: {error}")
    return args


def main():
    args = parse_args(sys.argv[1:])
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as the scripts do
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        machine = torch.cuda.get_device_name(args.device)
    else:
        machine = f"a CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), " \
                  f"{torch.get_num_threads()} threads"
    rates, rows = matmul_rates(args.device), []
    if args.step:
        rows = step_rows(rates, args)
    else:
        for configuration in itertools.product(args.T, args.n_head, args.dtype, args.dropout):
            if sys.stderr.isatty():
                print("T {}, {} heads, {}, dropout {} ".format(*configuration), end="\r", file=sys.stderr)
            rows += attention_rows(*configuration, rates, args)
    command = " ".join(["python", "bench.py", *sys.argv[1:]])
    print(f"`{command}` on {machine}, torch {torch.__version__}, batch {rows[0]['batch_size']}"
          f"{' (smaller than on a GPU)' * (args.device.type == 'cpu')}: median (quartiles) of "
          f"{min((row['n'] for row in rows if not row['note']), default=0)} or more timings; TFLOP/s (share "
          "of " + " and ".join(f"{rate / 1e12:.2g} in {name}" for name, rate in rates.items())
          + " of a large matrix product); MiB allocated at the peak, without what was there before.\n")
    for i, line in enumerate(table(rows)):
        print("|", " | ".join(map(str, line)), "|")
        if i == 0:
            print("|", " | ".join("---" for _ in line), "|")
    if args.csv:
        common = {"device": machine, "torch": torch.__version__, "command": command}
        rows = [row | common for row in rows]
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, dict.fromkeys(itertools.chain(*rows)), lineterminator="\n")
            out.writeheader()
            out.writerows({name: f"{value:.5g}" if isinstance(value, float) else value
                           for name, value in row.items()} for row in rows)
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    main()
