"""Why attention is fused, measured: attention by hand and by SDPA on this machine, as a table in Markdown.

    python bench.py                                               # two minutes
    python bench.py --T 256 512 1024 2048 --plot attention.png    # how time and memory grow
    python bench.py --step --plot step.png    # a training step, from eager float32 to all that helps
"""
import argparse, csv, functools, importlib.util, itertools, math, os, statistics, sys, timeit, warnings
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory is talkative
import torch, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
import gpt, gpt_v2, gpt_v3
try:
    import triton, triton.testing, triton.language as tl
except ImportError:  # macOS, Windows
    triton = None

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
        dropout and for the product with V. Here they exist on the chip only, BLOCK_N keys at a time. The
        softmax needs the maximum and the sum of a whole row: both are kept for the keys seen so far, and what
        was summed under an older maximum is scaled down to the new one (Milakov & Gimelshein 2018; attention
        as one kernel Dao et al. 2022; rows in parallel and keys in the loop Dao 2023, FlashAttention-2)."""
        block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see the most keys: they start first
        head = tl.program_id(1).to(tl.int64)  # of all B H of them
        rows, dims = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)  # hs and padding
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
    flash_kernel[triton.cdiv(T, 128), B * H](
        q, k, v, out, *q.stride()[:3], T, H, hs ** -0.5 * math.log2(math.e), hs, triton.next_power_of_2(hs),
        BLOCK_M=128, BLOCK_N=64, num_warps=4 if hs <= 64 else 8, num_stages=2)
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

def attend(function, q, k, v, grad, mask, dropout, backward):
    """One pass of a contender -> (out,), or with backward (out, dq, dk, dv)."""
    with torch.set_grad_enabled(backward):
        out = function(q, k, v, mask, dropout)
        return (out, *torch.autograd.grad(out, (q, k, v), grad)) if backward else (out,)

# --- Correct first, then fast ----------------------------------------------------------------------------
def check(function, q, k, v, grad, mask, dropout, backward):
    """The largest error of the output and the gradients, in multiples of what rounding and chance explain.
    The truth is manual in float64, for the first and the last sequence. With dropout there is no one truth,
    but every draw has to keep three laws; an error of 1 or more raises ArithmeticError:
    * the output's squared distance from that without dropout is p/(1-p) sum_j weights_j^2 v_j^2 on average;
    * out = W v and dv = W^T grad of the same weights W after dropout, and so sum_t dv v = sum_t grad out;
    * the same shift of all keys changes nothing, sum_t dk = 0, if both passes dropped the same weights."""
    rounding = 8 * 2.0 ** -(8 if q.dtype == torch.bfloat16 else 11 if q.is_cuda else 20)  # 11 bits is TF32
    exact = [x[[0, -1]].detach().double().requires_grad_() for x in (q, k, v)] + [grad[[0, -1]].double()]
    true = attend(manual, *exact, mask, 0.0, backward)
    got = [x[[0, -1]].double() for x in attend(function, q, k, v, grad, mask, 0.0, backward)]
    errors = [(x - y).abs().max() / y.abs().max() / rounding for x, y in zip(got, true)]
    if dropout:
        got = [x[[0, -1]].double() for x in attend(function, q, k, v, grad, mask, dropout, backward)]
        q, k, v, grad = (x.detach() for x in exact)
        weights = manual(q, k, torch.eye(len(mask), dtype=q.dtype, device=q.device), mask, 0.0)
        variance = dropout / (1 - dropout) * weights ** 2 @ v ** 2  # (B, H, T, hs)
        chance = 2 * (max(2, 1 / dropout / (1 - dropout) - 4) / q[..., 0].numel()) ** 0.5  # 2 sigma at hs = 1
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
    with warnings.catch_warnings(record=True) as caught:  # SDPA warns what hinders which of its kernels
        warnings.filterwarnings("ignore", ".*(because:|disabled)")  # and that the others were not asked for
        try:
            return work()
        except Exception as error:  # of any kind: from a kernel, a compiler, a driver
            texts = [str(error) or type(error).__name__, *(str(warning.message) for warning in caught)]
            row["note"] = " ".join(text.split("\n")[0].split("(Triggered")[0].strip() for text in texts)

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
    """TFLOP/s of a product of two large square matrices: what this device can do in dtype."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, dtype))
    return 2 * n**3 / 1e9 / statistics.median(clock(lambda: a @ b.T, device))  # transposed as in a Linear

def measure(rows, peaks, rounds):
    """Complete rows by the times of their calls: in turn, so that a disturbance hits them all."""
    for _, row in itertools.product(range(rounds), rows):
        row.setdefault("times", []).extend(attempt(row, lambda: clock(row["call"], row["device"])) or [])
    for row in rows:
        del row["call"]  # and what it holds
        if not row["note"]:
            low, median, high = statistics.quantiles(row["times"] * 2, n=4)  # twice: there may be one alone
            row.update(n=len(row["times"]), ms=median, ms_q1=low, ms_q3=high,
                       matmul_share=row["flops"] / median / 1e9 / peaks[row["dtype"]])

def attention_rows(flags):
    """Yield a row to time for each pass of each contender, its output and gradients checked.
    FLOPs as Dao (2023) counts: 4 T^2 hs a head, half of it as causal, 3.5 times as much with the backward."""
    torch.compiler.reset()  # to compile for this configuration alone
    config = gpt.parse_args(flags)
    B, H, T, hs = config.batch_size, config.n_head, config.block_size, config.n_embd // config.n_head
    mask = torch.tril(torch.ones(T, T, dtype=torch.bool, device=config.device))
    like = dict(dtype=getattr(torch, config.dtype), device=config.device)
    qkv = torch.randn(B, T, 3, H, hs, **like).permute(2, 0, 3, 1, 4)  # of one projection, as in gpt_v3.py
    grad = torch.randn(B, T, H, hs, **like).transpose(1, 2)
    inputs = *(x.requires_grad_() for x in qkv), grad, mask, config.dropout
    for backward, (name, function) in itertools.product((False, True), CONTENDERS.items()):
        row = vars(config) | {"contender": name, "case": "forward + backward" if backward else "forward",
                              "flops": (7 if backward else 2) * B * H * T * T * hs, "note": "",
                              "call": functools.partial(attend, function, *inputs, backward)}
        row["error"] = attempt(row, lambda: check(function, *inputs, backward))
        row["peak_mib"] = attempt(row, lambda: peak_mib(row["call"], config.device))
        yield row

# --- A training step -------------------------------------------------------------------------------------
SCRIPTS = [gpt, gpt_v2, gpt_v3]
RUNGS = {  # name: what is one graph ("step" captures compiled blocks), fused AdamW?, where this is no use
    "eager float32": (None, False, None), "+ bfloat16": (None, False, "float32"),
    "+ compile": ("block", False, None), "+ fused AdamW": ("block", True, None),
    "+ combo kernels": ("combo", True, "cpu"), "+ whole model compiled": ("model", True, "cpu"),
    "+ reduce-overhead": ("reduce", True, "cpu"), "compiled blocks + CUDA graphs": ("graphs", True, "cpu"),
    "compiled blocks + CUDA graph of the step": ("step", True, "cpu")}

def training_step(script, config, unit, fused):
    """A script's new model, a function that trains it for a step -> the loss, and what draws its batches."""
    torch.backends.cuda.enable_flash_sdp(True)  # PyTorch's default, until the model has its say
    data, _, chars, _ = script.load_data(config)
    model = script.GPT(config, len(chars)).to(config.device)
    flash = torch.backends.cuda.flash_sdp_enabled()
    model.forward = torch.autocast(config.device, torch.bfloat16, config.dtype == "bfloat16")(model.forward)
    for module in [] if unit is None else [model] if unit in ("model", "reduce") else model.blocks:
        module.compile(options={"combo_kernels": True} if unit == "combo" else None,
                       mode="reduce-overhead" if unit == "reduce" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, capturable=unit == "step",
                                  fused=fused or None)  # None is PyTorch's choice: foreach on a GPU
    generator = torch.Generator(config.device).manual_seed(config.seed)
    def step():
        torch.backends.cuda.enable_flash_sdp(flash)  # a switch for all models: others came after this one
        start = torch.randint(len(data) - config.block_size, (config.batch_size,), generator=generator,
                              device=config.device)
        _, loss = model(*script.get_batch(data, start, config.block_size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at the end: so gradients count as memory of the step
        return loss.detach()
    return model, step, generator

def capture(step, generator):
    """The step as a CUDA graph, all its kernels in one launch: a function that replays it -> the loss."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # whatever is done once is done, and AdamW has its moments
            step()
    graph.register_generator_state(generator)  # so that each replay draws another batch
    with torch.cuda.graph(graph):
        loss = step()  # stays where it is: a replay writes there
    return lambda step=step: graph.replay() or loss  # which keeps the model and the data of step alive

def step_rows(script, flags):
    """Yield a row to time for a step of a script on each rung; the first step is timed here.
    FLOPs of a token: 6 for each weight of a Linear, and 6 T n_embd for the causal attention of each layer."""
    torch.compiler.reset()
    torch.compiler.config.force_disable_caches = True  # the first step as on a machine that never compiled it
    for rung, (unit, fused, no_use) in RUNGS.items():
        config = script.parse_args(flags + ["--dtype=float32"] * (rung == "eager float32"))
        if no_use in (config.dtype, config.device):
            continue
        model, step, generator = training_step(script, config, unit, fused)
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        weights += config.n_layer * config.block_size * config.n_embd  # as if the causal attention were some
        row = vars(config) | dict(contender=model.experiment, case=rung, note="", call=step,
                                  flops=6 * config.batch_size * config.block_size * weights)
        row["first_step_s"] = attempt(row, lambda: timeit.timeit(lambda: step().item(), number=1))
        row["peak_mib"] = attempt(row, lambda: peak_mib(step, config.device))  # a graph keeps as much
        if unit == "graphs":
            attempt(row, lambda: script.record_graphs(model, config))
        if unit == "step":
            row["call"] = attempt(row, lambda: capture(step, generator))
        yield row

# --- Results ---------------------------------------------------------------------------------------------
DTYPES = ["float32", "bfloat16"]
COLUMNS = """batch_size block_size n_embd n_head n_layer dropout dtype case contender error first_step_s
    peak_mib n ms ms_q1 ms_q3 flops matmul_share note device torch command""".split()

def table(rows):
    """The lines of a table in Markdown: what rows differ by, then a column for each contender with the median
    time, the memory at the peak, and of steps the FLOP/s in those of a large matrix product and the first."""
    cell = "{ms:.4g} ms, {peak_mib:.4g} MiB"
    cell += ", {matmul_share:.0%} of matmul, first {first_step_s:.1f} s" if "first_step_s" in rows[0] else ""
    keys = [key for key in COLUMNS[:8] if len({row[key] for row in rows}) > 1]
    good = [row for row in rows if not row["note"]]
    columns, lines = list(dict.fromkeys(row["contender"] for row in good)), {}
    for row in good:
        line = lines.setdefault(tuple(str(row[key]) for key in keys), dict.fromkeys(columns, "-"))
        line[row["contender"]] = cell.format(**row)
    cells = [[*place, *line.values()] for place, line in lines.items()]
    return [f"| {' | '.join(line)} |" for line in [keys + columns, ["---"] * len(keys + columns), *cells]]

def plot(path, rows):
    """Draw time and memory into a PNG: of a script's step as bars by rung, of attention against T."""
    from matplotlib.figure import Figure
    step, lines = "first_step_s" in rows[0], {}
    for row in rows:
        title = "Step of {contender}.py, T = {block_size}" if step else "Attention in {dtype}"
        keys = title + ", {n_head} heads, dropout {dropout:g}", "" if step else "{contender}, {case}"
        lines.setdefault(tuple(key.format(**row) for key in keys), []).append(row)
    titles = list(dict.fromkeys(title for title, _ in lines))
    figure = Figure(figsize=(4 + 4 * len(titles), 7), layout="constrained")
    figure.suptitle("{batch_size} sequences, {n_embd} channels; {device}, torch {torch}".format(**rows[0]))
    axes = figure.subplots(2, len(titles), sharex=True, sharey="row", squeeze=False)
    for (title, label), line in lines.items():
        for ax, key, unit in zip(axes[:, titles.index(title)], ("ms", "peak_mib"), ("ms", "MiB at the peak")):
            x, y = [row["case" if step else "block_size"] for row in line], [row[key] for row in line]
            if step:
                ax.bar_label(ax.bar(x, y), fmt="%.4g", label_type="center", color="white")
            else:
                ax.loglog(x, y, "-" if "backward" in label else ":", marker=".", label=label,
                          color=f"C{list(CONTENDERS).index(line[0]['contender'])}")
            ax.minorticks_off()
            ax.set_xticks(x, [str(tick).replace(" ", "\n").replace("+\n", "+ ") for tick in x])
            ax.set(title=title, xlabel="" if step else "T", ylabel=unit)
    figure.legend(handles=axes[0, 0].lines, loc="outside lower center", ncols=1 + len(titles), frameon=False)
    figure.savefig(path, dpi=120)

# --- Main ------------------------------------------------------------------------------------------------
def parse_args(argv):
    """The flags in argv as a Namespace, checked; its flags are those for the scripts, by configuration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: gpt.fail(f"{message}; --help lists the flags")
    devices, flag = ["cuda"] * bool(triton and torch.cuda.is_available()) + ["cpu"], parser.add_argument
    flag("--step", action="store_true", help="time a training step; flags not listed here are gpt.py's")
    flag("--plot", help="draw time and memory into this file, a PNG")
    flag("--csv", help="write all numbers into this file")
    flag("--rounds", type=int, choices=range(1, 10), default=5, help="turns of 0.1 s or more for each call")
    flag("--device", choices=devices, default=devices[0], help="where to compute")
    flag("--T", "--block_size", dest="block_size", nargs="+", default=[256], help="sequence lengths")
    flag("--n_head", nargs="+", default=[6], help="numbers of attention heads")
    flag("--dtype", nargs="+", default=["auto"] if "--step" in argv else DTYPES, help="precisions")
    flag("--dropout", nargs="+", default=[0.2] if "--step" in argv else [0.0, 0.2], help="shares dropped")
    args, others = parser.parse_known_args(argv)
    others = [f"--device={args.device}"] + ["--batch_size=4"] * (args.device == "cpu") + others
    args.flags = [[*others, f"--block_size={T}", f"--n_head={H}", f"--dtype={dtype}", f"--dropout={p}"] for
                  T, H, dtype, p in itertools.product(args.block_size, args.n_head, args.dtype, args.dropout)]
    configs = [script.parse_args(flags) for script in (gpt, gpt_v2, gpt_v3) for flags in args.flags]
    for config in configs * args.step:  # a text that is missing, or too short
        gpt.load_data(config)
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
    peaks, rows = {dtype: matmul_tflops(dtype, args.device) for dtype in DTYPES}, []
    works = [functools.partial(step_rows, script) for script in SCRIPTS] if args.step else [attention_rows]
    for flags, work in itertools.product(args.flags, works):
        print(*flags, file=sys.stderr)
        new = []
        for row in work(flags):
            print("{contender}, {case} {note}".format(**row), file=sys.stderr)
            new.append(row)
        measure(new, peaks, args.rounds)
        rows += [row | common for row in new]
        if args.csv:  # each time: a run that is cut off keeps what it has
            with open(args.csv, "w", newline="", encoding="utf-8") as file:
                lines = [COLUMNS, *([row.get(name) for name in COLUMNS] for row in rows)]
                csv.writer(file, lineterminator="\n").writerows(lines)
    notes = dict.fromkeys("* {contender}, {case}: {note}".format(**row) for row in rows if row["note"])
    print("`{command}` on {device}, torch {torch}\n".format(**common), *table(rows), "", *notes, sep="\n")
    if args.plot and not all(row["note"] for row in rows):
        plot(args.plot, [row for row in rows if not row["note"]])

if __name__ == "__main__":
    main()
