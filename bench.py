"""Why attention is fused, measured: attention by hand and by SDPA on this machine, as a table in Markdown.

    python bench.py                                                          # two minutes
    python bench.py --T 256 512 1024 2048 --n_head 6 --plot attention.png    # how time and memory grow
    python bench.py --step    # a training step of the three scripts, from eager float32 to all that helps
"""
import argparse, csv, functools, importlib.util, itertools, math, os, statistics, sys, timeit, warnings
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory is talkative
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
import gpt, gpt_v2, gpt_v3
try:
    import triton, triton.testing, triton.language as tl
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

def sdpa(backend, bf16_sums, q, k, v, mask, dropout):
    """F.scaled_dot_product_attention by one backend; math computes in float32 unless bf16_sums."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(bf16_sums)  # a switch for CPUs, too
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)

if triton:
    @triton.jit
    def flash_kernel(Q, K, V, OUT, batch_stride, head_stride, time_stride, T, H, scale, hs: tl.constexpr,
                     BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """BLOCK_M rows of softmax(Q K^T scale) V of one head of one sequence, in one kernel: that is "fused".
        By hand, the scores (T, T) go out to memory and come back for the mask, for the softmax, for the
        dropout and for the product with V. Here they exist on the chip only, BLOCK_N keys at a time, and
        nothing but the result is written. A softmax needs the maximum and the sum of a whole row, though:
        both are kept for the keys seen so far, and what was summed under an older maximum is scaled down to
        the new one. That online softmax is Milakov & Gimelshein's (2018), attention as such a kernel is Dao
        et al.'s (2022), with the rows in parallel and the keys in the loop Dao's (2023, FlashAttention-2).
        Q, K and V share their strides, counted in elements, the last one being 1; OUT (B, T, H, hs) is
        contiguous. scale includes log2(e), as GPUs compute 2^x; BLOCK_D is hs rounded up to a power of 2."""
        block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see the most keys: they start first
        head = tl.program_id(1).to(tl.int64)  # of all B H of them
        rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        inside = (rows[:, None] < T) & (dims < hs)  # all else is padding: read as zeros, never written
        start = head // H * batch_stride + head % H * head_stride
        q = tl.load(Q + start + rows[:, None] * time_stride + dims, mask=inside, other=0.0)  # (M, D)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # the maximum of each row's scores so far
        total = tl.zeros((BLOCK_M,), tl.float32)  # sum of 2^(score - largest) so far
        out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)  # sum of 2^(score - largest) v so far
        for first in range(0, tl.minimum((block + 1) * BLOCK_M, T), BLOCK_N):  # no key after the last row
            keys = first + tl.arange(0, BLOCK_N)
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
    """The kernel above, for any T and for q, k and v that share their strides, the last one being 1."""
    B, H, T, hs = q.shape
    if (not triton or not q.is_cuda and isinstance(flash_kernel, triton.JITFunction) or not 16 <= hs <= 128
            or q.dtype != torch.bfloat16 or dropout or torch.is_grad_enabled()):
        raise NotImplementedError("needs Triton, a GPU, bfloat16, 16 <= hs <= 128, no dropout, no backward")
    out = q.new_empty(B, T, H, hs)  # heads side by side, as the next layer wants them
    BLOCK_D = triton.next_power_of_2(hs)
    flash_kernel[triton.cdiv(T, 128), B * H](
        q, k, v, out, *q.stride()[:3], T, H, hs ** -0.5 * math.log2(math.e), hs, BLOCK_D, BLOCK_M=128,
        BLOCK_N=64, num_warps=8 if BLOCK_D == 128 else 4, num_stages=2)
    return out.transpose(1, 2)

CONTENDERS = {
    "manual": manual,
    "manual, compiled": torch.compile(manual, dynamic=False, fullgraph=True),
    "SDPA math": functools.partial(sdpa, SDPBackend.MATH, False),
    "SDPA math, bf16 sums": functools.partial(sdpa, SDPBackend.MATH, True),
    "SDPA flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION, False),
    "SDPA efficient": functools.partial(sdpa, SDPBackend.EFFICIENT_ATTENTION, False),
    "SDPA cuDNN": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION, False),
    "Triton, this file": triton_flash}

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
def check(function, q, k, v, grad, mask, dropout, backward):
    """The largest error of the output and the gradients, in multiples of what rounding and chance explain.
    The truth is manual in float64, for the first and the last sequence. With dropout there is no one truth,
    but every draw has to keep three laws; an error of 1 or more raises ArithmeticError:
    * the output's squared distance from that without dropout is p/(1-p) sum_j weights_j^2 v_j^2 on average;
    * output and dv come from the same weights W after dropout: out = W v, dv = W^T grad, and so
      sum_t dv v = sum_t grad out;
    * the same shift of all keys changes nothing, sum_t dk = 0, if both passes dropped the same weights."""
    rounding = 8 * 2.0 ** -(8 if q.dtype == torch.bfloat16 else 11 if q.is_cuda else 20)  # 11 bits is TF32
    ends = [0, -1]
    exact = [x[ends].detach().double().requires_grad_() for x in (q, k, v)] + [grad[ends].double()]
    true = attend(manual, *exact, mask, 0.0, backward)
    got = [x[ends].double() for x in attend(function, q, k, v, grad, mask, 0.0, backward)]
    errors = [(x - y).abs().max() / y.abs().max() / rounding for x, y in zip(got, true)]
    if dropout:
        got = [x[ends].double() for x in attend(function, q, k, v, grad, mask, dropout, backward)]
        q, k, v, grad = (x.detach() for x in exact)
        weights = manual(q, k, torch.eye(len(mask), dtype=q.dtype, device=q.device), mask, 0.0)
        variance = dropout / (1 - dropout) * weights ** 2 @ v ** 2  # (B, H, T, hs)
        chance = 2.5 * (max(2, 1 / dropout / (1 - dropout) - 4) / q[..., 0].numel()) ** 0.5  # 2.5 sigma
        errors.append((((got[0] - true[0].detach()) ** 2 / variance).mean() - 1).abs() / chance)
        if backward:
            out, _, dk, dv = got
            errors += [(dv * v - grad * out).sum(-2).norm() / (grad * out).norm() / rounding,
                       dk.sum(-2).norm() / dk.norm() / rounding]
    error = torch.stack(errors).max().item()  # nan if one is
    if not error < 1:
        raise ArithmeticError(f"wrong: the error is {error:.2g} times what rounding and chance explain")
    return error

def attempt(row, work):
    """work(), or if that fails None and the reason in row["note"]; a row with a note is let be."""
    if row["note"]:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return work()
        except Exception as error:  # of any kind: from a kernel, a compiler, a driver
            row["note"] = (str(error).strip() or type(error).__name__).splitlines()[0]
    if row["note"].startswith(("No available kernel", "No viable backend")):  # SDPA's reasons are warnings
        reasons = [str(warning.message).split(" (Triggered")[0] for warning in caught]
        reasons = [text for text in reasons if "not used because" not in text and "disabled" not in text]
        row["note"] = (reasons + ["no such kernel here"])[0]

# --- Then fast -------------------------------------------------------------------------------------------
def clock(call, device):
    """Milliseconds of each of the calls that fit into a tenth of a second, of one at least."""
    if device == "cuda":  # do_bench also empties the L2 cache before each call
        return triton.testing.do_bench(call, warmup=25, rep=100, return_mode="all")
    times = []
    while sum(times) < 100:
        times.append(1e3 * timeit.timeit(call, number=1))
    return times

def peak_mib(call, device):
    """MiB allocated at the peak of a call, its results included, what was there before not."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    changes = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes)) / 2**20  # what is freed is negative

def matmul_tflops(dtype, device):
    """TFLOP/s of a product of two large square matrices: what this device can do."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / 1e9 / statistics.median(clock(lambda: a @ b.T, device))  # transposed as in a Linear

def measure(rows, peaks, rounds):
    """Complete rows by what their calls need and take: in turn, so that a disturbance hits them all."""
    for row in rows:
        row["peak_mib"], row["times"] = attempt(row, lambda: peak_mib(row["call"], row["device"])), []
    for _, row in itertools.product(range(rounds), rows):
        row["times"] += attempt(row, lambda: clock(row["call"], row["device"])) or []
    for row in rows:
        del row["call"]  # and what it holds
        if not row["note"]:
            low, median, high = statistics.quantiles(row["times"] * 2, n=4)  # twice: there may be one alone
            tflops = row["flops"] / median / 1e9
            row.update(n=len(row["times"]), ms=median, ms_q1=low, ms_q3=high, tflops=tflops,
                       matmul_share=tflops / peaks[row["dtype"]],
                       tokens_per_s=1e3 * row["batch_size"] * row["block_size"] / median)

def attention_rows(flags):
    """Yield a row to measure for each pass of each contender, its output and gradients checked.
    FLOPs as Dao (2023) counts: 4 T^2 hs a head, half of it as causal, 3.5 times as much with the backward."""
    torch.compiler.reset()  # to compile for this configuration alone
    config = gpt.parse_args(flags)
    B, H, T, hs = config.batch_size, config.n_head, config.block_size, config.n_embd // config.n_head
    mask = torch.tril(torch.ones(T, T, dtype=torch.bool, device=config.device))
    inputs = *draw(B, H, T, hs, DTYPES[config.dtype], config.device), mask, config.dropout
    for backward, (name, function) in itertools.product((False, True), CONTENDERS.items()):
        row = vars(config) | {"attention": name, "pass": "forward + backward" if backward else "forward",
                              "flops": (7 if backward else 2) * B * H * T * T * hs, "note": "",
                              "call": functools.partial(attend, function, *inputs, backward)}
        row["error"] = attempt(row, lambda: check(function, *inputs, backward))
        yield row

# --- A training step -------------------------------------------------------------------------------------
RUNGS = {  # name: dtype, what is compiled as one graph, whether AdamW is one fused kernel
    "eager float32": ("float32", None, False),
    "+ bfloat16": ("auto", None, False),
    "+ compile": ("auto", "block", False),
    "+ fused AdamW": ("auto", "block", True),
    "+ whole model compiled": ("auto", "model", True)}

def training_step(script, config, compiled, fused):
    """A script's new model, and a function that trains it for one step on a random batch -> the loss."""
    torch.backends.cuda.enable_flash_sdp(True)  # PyTorch's default, until the model has its say
    data, _, chars, _ = script.load_data(config)
    model = script.GPT(config, len(chars)).to(config.device)
    flash = torch.backends.cuda.flash_sdp_enabled()
    autocast = torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")
    model.forward = autocast(model.forward)
    for module in {None: [], "block": model.blocks, "model": [model]}[compiled]:
        module.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=fused)
    def step():
        torch.backends.cuda.enable_flash_sdp(flash)  # a switch for all models: others came after this one
        start = torch.randint(len(data) - config.block_size, (config.batch_size,), device=config.device)
        _, loss = model(*script.get_batch(data, start, config.block_size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at the end: so gradients count as memory of the step
        return loss.detach()
    return model, step

def step_rows(flags):
    """Yield a row to measure for a step of each script on each rung; the first step is timed here.
    FLOPs of a token: 6 for each weight of a Linear, and 6 T n_embd for the causal attention of each layer."""
    torch.compiler.config.force_disable_caches = True  # the first step as on a machine that never compiled it
    for script, (rung, (dtype, compiled, fused)) in itertools.product((gpt, gpt_v2, gpt_v3), RUNGS.items()):
        config = script.parse_args([*flags, "--dtype", dtype])
        if (rung, config.dtype) == ("+ bfloat16", "float32") or (compiled, config.device) == ("model", "cpu"):
            continue  # bfloat16 is slow here, and a CPU launches no kernels that larger graphs could save
        model, step = training_step(script, config, compiled, fused)
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        weights += config.n_layer * config.block_size * config.n_embd  # as if the causal attention were some
        row = vars(config) | dict(script=model.experiment, rung=rung, note="", call=step,
                                  flops=6 * config.batch_size * config.block_size * weights)
        row["first_step_s"] = attempt(row, lambda: timeit.timeit(lambda: step().item(), number=1))
        yield row

# --- Results ---------------------------------------------------------------------------------------------
COLUMNS = """batch_size block_size n_embd n_head n_layer dropout dtype attention pass script rung error
    first_step_s peak_mib n ms ms_q1 ms_q3 tokens_per_s tflops matmul_share note device torch command"""

def table(rows):
    """The lines of a table in Markdown, the first two its header, without the rows that have a note."""
    step = rows[0].get("rung")
    cells = {"B x T x C": "{batch_size:g} x {block_size:g} x {n_embd:g}", "heads": "{n_head:g}",
             "dropout": "{dropout:g}", "dtype": "{dtype}"}
    cells |= {name: f"{{{name}}}" for name in (("script", "rung") if step else ("attention", "pass"))}
    cells |= {"ms (quartiles)": "{ms:.4g} ({ms_q1:.4g} to {ms_q3:.4g})",
              "TFLOP/s (share of matmul)": "{tflops:.2g} ({matmul_share:.0%})", "MiB": "{peak_mib:.1f}"}
    if step:
        cells |= {"tokens/s": "{tokens_per_s:,.0f}", "first step, s": "{first_step_s:.1f}"}
    lines = [[cell.format(**row) for cell in cells.values()] for row in rows if not row["note"]]
    return [f"| {' | '.join(line)} |" for line in [cells, ["---"] * len(cells), *lines]]

def plot(path, rows):
    """Draw time and memory against T on logarithmic axes into a PNG, a column for each configuration."""
    from matplotlib.figure import Figure
    lines = {}
    for row in rows:
        title = "{n_head} heads, {dtype}, dropout {dropout:g}".format(**row)
        lines.setdefault((title, row["attention"], row["pass"]), []).append(row)
    titles = list(dict.fromkeys(title for title, _, _ in lines))
    figure = Figure(figsize=(4 + 4 * len(titles), 7), layout="constrained")
    axes = figure.subplots(2, len(titles), sharex=True, sharey="row", squeeze=False)
    for (title, name, direction), line in lines.items():
        for ax, key in zip(axes[:, titles.index(title)], ("ms", "peak_mib")):
            ax.loglog([row["block_size"] for row in line], [row[key] for row in line],
                      ":" if direction == "forward" else "-", marker=".", label=f"{name}, {direction}",
                      color=f"C{list(CONTENDERS).index(name)}")
            ax.set(title=title, xlabel="T", ylabel=key)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)

# --- Main ------------------------------------------------------------------------------------------------
def parse_args(argv):
    """The flags in argv as a Namespace, checked; its flags are those for the scripts, by configuration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: gpt.fail(f"{message}; --help lists the flags")
    devices = ["cuda"] * bool(triton and torch.cuda.is_available()) + ["cpu"]
    flag, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    either("--step", action="store_true", help="time a training step; flags not listed here are gpt.py's")
    either("--plot", help="draw time and memory against T into this file, a PNG")
    flag("--csv", help="write all numbers into this file")
    flag("--rounds", type=int, default=5, help="turns of each contender, of a tenth of a second or more")
    flag("--device", choices=devices, default=devices[0], help="where to compute")
    flag("--T", "--block_size", dest="block_size", nargs="+", default=[256], help="sequence lengths")
    flag("--n_head", nargs="+", default=[6], help="numbers of attention heads")
    flag("--dtype", nargs="+", default=["auto"] if "--step" in argv else list(DTYPES), help="precisions")
    flag("--dropout", nargs="+", default=[0.2] if "--step" in argv else [0.0, 0.2], help="shares dropped")
    args, others = parser.parse_known_args(argv)
    others = [f"--device={args.device}"] + ["--batch_size=4"] * (args.device == "cpu") + others
    args.flags = [[*others, f"--block_size={T}", f"--n_head={H}", f"--dtype={dtype}", f"--dropout={p}"] for
                  T, H, dtype, p in itertools.product(args.block_size, args.n_head, args.dtype, args.dropout)]
    for script, flags in itertools.product((gpt, gpt_v2, gpt_v3), args.flags):
        script.parse_args(flags)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} is less than 1")
    for path in filter(None, (args.csv, args.plot)):  # better now than in two minutes
        if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
            parser.error(f"{path} is a folder, or in none that is there and can be written to")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib")
    return args

def main():
    args = parse_args(sys.argv[1:])
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as the scripts do
    cpu = f"a CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    common = dict(device=torch.cuda.get_device_name() if args.device == "cuda" else cpu,
                  torch=torch.__version__, command=" ".join(["python bench.py", *sys.argv[1:]]))
    print("`{command}` on {device}, torch {torch}; MiB at a call's peak.\n".format(**common))
    peaks, rows = {name: matmul_tflops(dtype, args.device) for name, dtype in DTYPES.items()}, []
    for flags in args.flags:
        new = list(step_rows(flags) if args.step else attention_rows(flags))
        measure(new, peaks, args.rounds)
        print("\n".join(table(new)[2 * bool(rows):]), flush=True)
        rows += new
    notes = "* {script}, {rung}: {note}" if args.step else "* {attention}: {note}"
    print("", *dict.fromkeys(notes.format(**row) for row in rows if row["note"]), sep="\n")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, COLUMNS.split(), "", "ignore", lineterminator="\n")
            out.writeheader()
            out.writerows(row | common for row in rows)
    if args.plot:
        plot(args.plot, [row for row in rows if not row["note"]])

if __name__ == "__main__":
    main()
