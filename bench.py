"""Why attention is fused, measured: attention by hand and by SDPA on this machine, as a table in Markdown.

    python bench.py                                               # two minutes
    python bench.py --T 256 512 1024 2048 --plot attention.png    # how time and memory grow
    python bench.py --step --plot step.png    # a training step, from eager float32 to all that helps
"""
import argparse, contextlib, functools, itertools, math, os, sys, time
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory is talkative
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import benchmark
import gpt, gpt_v2, gpt_v3
try:
    import pandas as pd
    import tabulate  # for DataFrame.to_markdown
    from matplotlib.figure import Figure
except ImportError as error:
    gpt.fail(f"{error.name} is missing; pip install -r requirements.txt brings it")
try:
    import triton, triton.testing
    import triton.language as tl
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
        By hand, the scores (T, T) go out to memory and come back for the mask, the softmax, the dropout and
        the product with V. Here they only exist on the chip, BLOCK_N keys at a time. A softmax needs the
        maximum and the sum of its whole row: both are kept for the keys seen so far, and what was summed
        under an older maximum is scaled down to the new one (Milakov & Gimelshein 2018; attention as one
        kernel Dao et al. 2022; rows in parallel, keys in the loop Dao 2023, FlashAttention-2)."""
        block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see the most keys: they start first
        head = tl.program_id(1).to(tl.int64)  # of all B H of them
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)  # hs and padding
        inside = (rows[:, None] < T) & (dims < hs)  # the rest is padding: read as zeros, never written
        start = head // H * batch_stride + head % H * head_stride
        q = tl.load(Q + start + rows[:, None] * time_stride + dims, mask=inside, other=0.0)  # (M, D)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # the maximum of each row's scores so far
        total = tl.zeros((BLOCK_M,), tl.float32)  # sum of 2^(score - largest) so far
        out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)  # sum of 2^(score - largest) v so far
        for first in range(0, tl.minimum((block + 1) * BLOCK_M, T), BLOCK_N):  # no key after the last row
            keys = first + tl.arange(0, BLOCK_N)
            exists = (keys[:, None] < T) & (dims < hs)
            k = tl.load(K + start + keys[:, None] * time_stride + dims, mask=exists, other=0.0)  # (N, D)
            v = tl.load(V + start + keys[:, None] * time_stride + dims, mask=exists, other=0.0)  # (N, D)
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
    if dropout or torch.is_grad_enabled() or q.dtype != torch.bfloat16 or not 16 <= hs <= 128:
        raise NotImplementedError("is for bfloat16 and 16 <= hs <= 128, without dropout and backward pass")
    out = q.new_empty(B, T, H, hs)  # heads side by side, as the next layer wants them
    scale = hs ** -0.5 * math.log2(math.e)
    flash_kernel[triton.cdiv(T, 128), B * H](
        q, k, v, out, *q.stride()[:3], T, H, scale, hs, triton.next_power_of_2(hs),
        BLOCK_M=128, BLOCK_N=64, num_warps=4 if hs <= 64 else 8, num_stages=2)
    return out.transpose(1, 2)

def contenders(device):
    """The contenders on a device, by name."""
    functions = {
        "manual": manual,
        "manual, compiled": torch.compile(manual, dynamic=False, fullgraph=True),
        "SDPA math": functools.partial(sdpa, SDPBackend.MATH, False),
        "SDPA math, bf16 sums": functools.partial(sdpa, SDPBackend.MATH, True),
        "SDPA flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION, False),
    }
    if device == "cuda":
        functions["SDPA efficient"] = functools.partial(sdpa, SDPBackend.EFFICIENT_ATTENTION, False)
        functions["SDPA cuDNN"] = functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION, False)
        functions["Triton, this file"] = triton_flash
    return functions

def attend(function, q, k, v, grad, mask, dropout, backward):
    """One pass of a contender -> [out], or with backward [out, dq, dk, dv]."""
    with torch.set_grad_enabled(backward):
        out = function(q, k, v, mask, dropout)
        if not backward:
            return [out]
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

# --- Correct first, then fast ----------------------------------------------------------------------------
def check(function, q, k, v, grad, mask, dropout, backward):
    """The largest error of a contender's results, in multiples of what rounding and chance explain; 1 or
    more raises ArithmeticError. The truth is manual in float64, for the first and the last sequence."""
    bits = 20
    if q.dtype == torch.bfloat16:
        bits = 8
    elif q.is_cuda:
        bits = 11  # TF32
    rounding = 8 * 2.0 ** -bits
    exact = [x[[0, -1]].detach().double().requires_grad_() for x in (q, k, v, grad)]
    true = attend(manual, *exact, mask, 0.0, backward)
    got = attend(function, q, k, v, grad, mask, 0.0, backward)
    errors = []
    for x, y in zip(got, true):
        errors.append((x[[0, -1]] - y).abs().max() / y.abs().max() / rounding)
    if dropout:
        errors.append(dropout_error(function, v, mask, dropout))
    if dropout and backward:  # out = W v and dv = W^T grad with the same W, so sum_t dv v = sum_t grad out
        out, _, _, dv = attend(function, q, k, v, grad, mask, dropout, backward)
        by_grad = grad.double() * out
        errors.append((dv.double() * v - by_grad).sum(-2).norm() / by_grad.norm() / rounding)
    error = torch.stack(errors).max().item()  # nan if one is
    if not error < 1:
        raise ArithmeticError(f"wrong: the error is {error:.2g} times what rounding and chance explain")
    return error

@torch.no_grad()
def dropout_error(function, v, mask, dropout):
    """How far the share of dropped weights is from dropout, in multiples of four standard deviations.
    Equal scores make row t of out the mean of t + 1 values. If these are ones before dropout, the variance
    of the mean is dropout / (1 - dropout) / (t + 1)."""
    zeros = torch.zeros_like(v)
    out = function(zeros, zeros, torch.ones_like(v), mask, dropout)
    means = out[..., 0].float()  # (B, H, T)
    variances = (means - 1) ** 2 * torch.arange(1, len(mask) + 1, device=v.device)
    expected = dropout / (1 - dropout)
    return (variances.mean() / expected - 1).abs() / (4 * (2 / means.numel()) ** 0.5)

@contextlib.contextmanager
def note_failure(row):
    """Turns an exception, from a kernel, a compiler or a driver, into the row's note."""
    try:
        yield
    except Exception as error:
        row["note"] = str(error).split("\n")[0]

def milliseconds(call, device):
    """The milliseconds of calls that take a tenth of a second in all, or of at least one."""
    if device == "cuda":  # do_bench also empties the L2 cache before each call
        return triton.testing.do_bench(call, warmup=25, rep=100, return_mode="all")
    timer = benchmark.Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
    return [1e3 * seconds for seconds in timer.blocked_autorange(min_run_time=0.1).times]

def peak_mib(call, device):
    """MiB allocated at the peak of a call, its results included, what existed before not."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]  # negative: what is freed
    return max(itertools.accumulate(changes)) / 2**20

@functools.cache
def matmul_tflops(dtype, device):
    """TFLOP/s of a product of two large square matrices: what this device can do in dtype."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, dtype))
    times = pd.Series(milliseconds(lambda: a @ b.T, device))  # transposed as in a Linear
    return 2 * n**3 / 1e9 / times.median()

def measure(rows, rounds):
    """Complete rows by the median and the quartiles of their calls' milliseconds: the calls take turns, so
    that a disturbance hits them all."""
    times = [[] for _ in rows]
    for _ in range(rounds):
        for row, row_times in zip(rows, times):
            if not row["note"]:
                with note_failure(row):
                    row_times += milliseconds(row["call"], row["device"])
    for row, row_times in zip(rows, times):
        del row["call"]  # and what it holds
        row["n"] = len(row_times)
        row["ms_q1"], row["ms"], row["ms_q3"] = pd.Series(row_times, dtype=float).quantile([0.25, 0.5, 0.75])
        row["matmul_share"] = row["flops"] / row["ms"] / 1e9 / matmul_tflops(row["dtype"], row["device"])
        result = row["note"] or f"{row['ms']:.4g} ms"
        print(f"{row['contender']}, {row['case']}: {result}", file=sys.stderr)

# --- Attention -------------------------------------------------------------------------------------------
def time_attention(flags, rounds):
    """A row for each pass of each contender, checked and timed.
    FLOPs as Dao (2023) counts them: 4 T^2 hs per head, halved as causal, 3.5 times with the backward pass."""
    torch.compiler.reset()  # to compile for these shapes alone
    config = gpt.parse_args(flags)
    B = config.batch_size
    T = config.block_size
    H = config.n_head
    hs = config.n_embd // H
    options = dict(dtype=getattr(torch, config.dtype), device=config.device)
    mask = torch.ones(T, T, dtype=torch.bool, device=config.device).tril()
    qkv = torch.randn(B, T, 3, H, hs, **options).permute(2, 0, 3, 1, 4)  # of one projection, as in gpt_v3.py
    grad = torch.randn(B, T, H, hs, **options).transpose(1, 2)
    q, k, v = [x.requires_grad_() for x in qkv]
    rows = []
    for case, backward in (("forward", False), ("forward + backward", True)):
        for name, function in contenders(config.device).items():
            arguments = (function, q, k, v, grad, mask, config.dropout, backward)
            call = functools.partial(attend, *arguments)
            flops = (7 if backward else 2) * B * H * T * T * hs
            row = vars(config) | dict(case=case, contender=name, call=call, flops=flops, note="")
            with note_failure(row):
                row["error"] = check(*arguments)
                row["peak_mib"] = peak_mib(call, config.device)
            rows.append(row)
    measure(rows, rounds)
    return rows

# --- A training step -------------------------------------------------------------------------------------
SCRIPTS = [gpt, gpt_v2, gpt_v3]
RUNGS = {  # each with what it says and all that came before
    "eager float32": {},
    "+ bfloat16": {},
    "+ compile": dict(compiled=True),
    "+ fused AdamW": dict(fused=True),
    "+ CUDA graphs": dict(graphs=True),  # this is what the scripts do
    "+ combo kernels": dict(combo_kernels=True),
}

def training_step(script, config, compiled=False, fused=None, graphs=False, combo_kernels=False):
    """A new model of a script and a function that trains it for a step -> the loss."""
    torch.backends.cuda.enable_flash_sdp(True)  # PyTorch's default, until the model has its say
    data, _, chars, _ = script.load_data(config)
    model = script.GPT(config, len(chars)).to(config.device)
    flash = torch.backends.cuda.flash_sdp_enabled()
    if compiled:
        for block in model.blocks:
            block.compile(options={"combo_kernels": True} if combo_kernels else None)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate,
                                  fused=fused)  # None is PyTorch's choice: foreach on a GPU
    generator = torch.Generator(config.device).manual_seed(config.seed)
    if graphs:
        script.record_graphs(model, config)

    def step():
        torch.backends.cuda.enable_flash_sdp(flash)  # a switch for all models: others came after this one
        start = torch.randint(len(data) - config.block_size, (config.batch_size,), generator=generator,
                              device=config.device)
        loss = script.compute_loss(model, data, start, config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at the end: so gradients count as memory of the step
        return loss.detach()
    return model, step

def time_steps(flags, rounds):
    """A row for a step of each script on each rung: the scripts in turn, the rungs one after the other.
    first_step_s is the time from a new model to its first loss, with compiling and recording, nothing cached.
    FLOPs per token: 6 for each weight of a Linear, and 6 T n_embd for the causal attention of each layer."""
    torch.compiler.config.force_disable_caches = True
    rows = []
    options = {}
    for case, addition in RUNGS.items():
        options.update(addition)
        if "graphs" in options and "--device=cuda" not in flags:
            break
        torch.compiler.reset()  # the models of the last rung are freed
        precision = ["--dtype=float32"] if case == "eager float32" else []
        rung = []
        for script in SCRIPTS:
            config = script.parse_args(flags + precision)
            row = vars(config) | dict(case=case, contender=script.GPT.experiment, call=None, flops=0, note="")
            with note_failure(row):
                start = time.perf_counter()
                model, row["call"] = training_step(script, config, **options)
                row["call"]().item()
                row["first_step_s"] = time.perf_counter() - start
                row["peak_mib"] = peak_mib(row["call"], config.device)
                row["flops"] = step_flops(model, config)
            rung.append(row)
        measure(rung, rounds)
        rows += rung
    return rows

def step_flops(model, config):
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    weights += config.n_layer * config.block_size * config.n_embd  # as if the causal attention were some
    return 6 * config.batch_size * config.block_size * weights

# --- Results ---------------------------------------------------------------------------------------------
SETTING = "batch_size block_size n_embd n_head n_layer dropout dtype".split()
TIMES = "peak_mib n ms ms_q1 ms_q3 flops matmul_share note device torch command".split()
ATTENTION_COLUMNS = [*SETTING, "case", "contender", "error", *TIMES]
STEP_COLUMNS = [*SETTING, "case", "contender", "first_step_s", *TIMES]

def print_table(frame):
    """Print a frame of results in Markdown: a line per call that was timed, and the notes of the others."""
    columns = [name for name in SETTING if frame[name].nunique() > 1]
    columns += ["case", "contender", "ms", "ms_q1", "ms_q3", "peak_mib", "matmul_share"]
    if "first_step_s" in frame:
        columns.append("first_step_s")
    print(frame.loc[frame.note == "", columns].to_markdown(index=False, floatfmt=".4g"))
    print()
    failed = frame[frame.note != ""]
    for note in (failed.contender + ", " + failed.case + ": " + failed.note).unique():
        print(f"* {note}")

def plot(path, frame, title, panel_names, x):
    """Draw medians, quartiles and memory into a PNG: a panel per setting, and a line per contender."""
    panels = frame.groupby(panel_names, sort=False)
    figure = Figure(figsize=(3 + 4 * len(panels), 8), layout="constrained")
    figure.suptitle(f"{title} on {frame.device[0]}, torch {frame.torch[0]}")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
    for (time_ax, memory_ax), (setting, panel) in zip(axes.T, panels):
        time_ax.set_title(", ".join(f"{name} {value}" for name, value in zip(panel_names, setting)))
        time_ax.set_ylabel("milliseconds: median, quartiles")
        memory_ax.set_ylabel("MiB at the peak")
        memory_ax.set_xlabel(x)
        memory_ax.tick_params(axis="x", rotation=20)
        for name, line in panel.groupby("contender", sort=False):
            errors = [line.ms - line.ms_q1, line.ms_q3 - line.ms]
            time_ax.errorbar(line[x], line.ms, errors, fmt="o-", capsize=3, label=name)
            memory_ax.plot(line[x], line.peak_mib, "o-")
    for ax in axes.flat:
        ax.set_ylim(bottom=0)
    figure.legend(handles=axes[0, 0].containers, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)

# --- Main ------------------------------------------------------------------------------------------------
def parse_args(argv):
    """The flags in argv as a Namespace; its flags are those of the scripts, one list per configuration."""
    step = "--step" in argv
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = gpt.fail
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    flag = parser.add_argument
    flag("--step", action="store_true", help="time a training step; flags not listed here are gpt.py's")
    flag("--plot", help="draw time and memory into this file, a PNG")
    flag("--csv", help="write all numbers into this file")
    flag("--rounds", type=int, choices=range(1, 10), default=5, help="turns of 0.1 s for each call (5)")
    flag("--device", choices=devices, default=devices[0], help="where to compute")
    flag("--T", "--block_size", nargs="+", type=int, default=[256], help="sequence lengths (256)")
    flag("--n_head", nargs="+", default=[6], help="numbers of attention heads (6)")
    flag("--dtype", nargs="+", default=["auto"] if step else ["float32", "bfloat16"], help="precisions")
    flag("--dropout", nargs="+", default=[0.2] if step else [0.0, 0.2], help="dropout probabilities")
    args, others = parser.parse_known_args(argv)
    if min(args.T) < 2:
        parser.error("--T must be at least 2: a single token has nothing to attend to")
    if args.device == "cuda" and not triton:
        parser.error("--device cuda needs Triton: pip install triton, or time --device cpu")
    if args.device == "cpu":
        others = ["--batch_size=4", *others]
    args.flags = []
    for T, n_head, dtype, dropout in itertools.product(args.T, args.n_head, args.dtype, args.dropout):
        args.flags.append([f"--device={args.device}", *others, f"--block_size={T}", f"--n_head={n_head}",
                           f"--dtype={dtype}", f"--dropout={dropout}"])
    for flags, script in itertools.product(args.flags, SCRIPTS):
        config = script.parse_args(flags)
        if step:
            script.load_data(config)  # which ends the program if the text is missing or too short
    for path in filter(None, (args.csv, args.plot)):
        try:
            open(path, "a").close()
        except OSError as error:
            parser.error(f"{path}: {error.strerror}")
    return args

def main():
    args = parse_args(sys.argv[1:])
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as the scripts do
    measure_all = time_steps if args.step else time_attention
    columns = STEP_COLUMNS if args.step else ATTENTION_COLUMNS
    command = " ".join(["python bench.py", *sys.argv[1:]])
    device = f"a CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    rows = []
    for flags in args.flags:
        print(*flags, file=sys.stderr)
        rows += measure_all(flags, args.rounds)
        frame = pd.DataFrame(rows).assign(device=device, torch=torch.__version__, command=command)
        frame = frame.reindex(columns=columns)
        if args.csv:  # each time: a run that is cut off keeps what it has
            frame.to_csv(args.csv, index=False)
    print(f"`{command}` on {device}, torch {torch.__version__}\n")
    print_table(frame)
    frame = frame[frame.note == ""].reset_index()
    if args.plot and args.step:
        plot(args.plot, frame, "A training step", ["block_size", "n_head", "dropout"], "case")
    elif args.plot:
        frame = frame[frame.case == "forward + backward"].reset_index()
        plot(args.plot, frame, "Attention, forward + backward,", ["dtype", "n_head", "dropout"], "block_size")

if __name__ == "__main__":
    main()
