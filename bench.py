"""Why attention is fused, measured: attention by hand and by SDPA on this machine, as a table in Markdown.

    python bench.py                                               # two minutes
    python bench.py --T 256 512 1024 2048 --plot attention.png    # how time and memory grow
    python bench.py --step --plot step.png    # a training step, from eager float32 to all that helps
"""
import argparse, contextlib, functools, importlib.util, itertools, math, os, sys, time, warnings
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory is talkative
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import benchmark
import gpt, gpt_v2, gpt_v3
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
    """The largest error of the output and the gradients, in multiples of what rounding and chance explain;
    1 or more raises ArithmeticError. The truth is manual in float64, for the first and the last sequence."""
    bits = 20
    if q.dtype == torch.bfloat16:
        bits = 8
    elif q.is_cuda:
        bits = 11  # TF32
    rounding = 8 * 2.0 ** -bits
    exact = [x[[0, -1]].detach().double().requires_grad_() for x in (q, k, v)]
    exact.append(grad[[0, -1]].double())
    true = attend(manual, *exact, mask, 0.0, backward)
    got = attend(function, q, k, v, grad, mask, 0.0, backward)
    errors = []
    for x, y in zip(got, true):
        errors.append((x[[0, -1]] - y).abs().max() / y.abs().max() / rounding)
    if dropout:
        got = attend(function, q, k, v, grad, mask, dropout, backward)
        got = [x[[0, -1]].double() for x in got]
        errors += dropout_errors(got, true[0], exact, mask, dropout, rounding)
    error = torch.stack(errors).max().item()  # nan if one is
    if not error < 1:
        raise ArithmeticError(f"wrong: the error is {error:.2g} times what rounding and chance explain")
    return error

def dropout_errors(got, true_out, exact, mask, dropout, rounding):
    """The errors of a pass with dropout. There is no one truth, but each draw has to obey three laws:
    * the output's squared distance from that without dropout is p/(1-p) sum_j weights_j^2 v_j^2 on average;
    * out = W v and dv = W^T grad with the same weights W after dropout, and so sum_t dv v = sum_t grad out;
    * the same shift of all keys changes nothing, sum_t dk = 0, if both passes dropped the same weights."""
    q, k, v, grad = [x.detach() for x in exact]
    identity = torch.eye(len(mask), dtype=q.dtype, device=q.device)
    weights = manual(q, k, identity, mask, 0.0)  # (B, H, T, T)
    variance = dropout / (1 - dropout) * weights ** 2 @ v ** 2  # (B, H, T, hs)
    kurtosis = max(2, 1 / dropout / (1 - dropout) - 4)
    chance = 2 * (kurtosis / q[..., 0].numel()) ** 0.5  # two sigma at hs = 1
    out = got[0]
    errors = [(((out - true_out.detach()) ** 2 / variance).mean() - 1).abs() / chance]
    if len(got) > 1:
        _, _, dk, dv = got
        errors.append((dv * v - grad * out).sum(-2).norm() / (grad * out).norm() / rounding)
        errors.append(dk.sum(-2).norm() / dk.norm() / rounding)
    return errors

@contextlib.contextmanager
def note_failure(row):
    """Turns an exception, from a kernel, a compiler or a driver, into the row's note."""
    with warnings.catch_warnings(record=True) as caught:  # SDPA warns what hinders which of its kernels
        warnings.filterwarnings("ignore", ".*(because:|disabled)")  # and that the others were not asked for
        try:
            yield
        except Exception as error:
            row["note"] = first_line(error)
            for warning in caught:
                row["note"] += " " + first_line(warning.message)

def first_line(message):
    """The first line of a message, without where in PyTorch it comes from."""
    line, *_ = str(message).split("\n")
    text, *_ = line.split("(Triggered")
    return text.strip()

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
    times = torch.tensor(milliseconds(lambda: a @ b.T, device))  # transposed as in a Linear
    return 2 * n**3 / 1e9 / times.median().item()

def measure(rows, rounds):
    """Complete rows by the times of their calls: in turn, so that a disturbance hits them all."""
    times = {id(row): [] for row in rows}
    for _ in range(rounds):
        for row in rows:
            if not row["note"]:
                with note_failure(row):
                    times[id(row)] += milliseconds(row["call"], row["device"])
    for row in rows:
        del row["call"]  # and what it holds
        if not row["note"]:
            summarize(row, torch.tensor(times[id(row)]))
        result = row["note"] or f"{row['ms']:.4g} ms"
        print(f"{row['contender']}, {row['case']}: {result}", file=sys.stderr)

def summarize(row, times):
    """Complete a row by the median and the quartiles of times (n,) in milliseconds."""
    quartiles = times.quantile(torch.tensor([0.25, 0.5, 0.75]))
    row["ms_q1"], row["ms"], row["ms_q3"] = quartiles.tolist()
    row["n"] = len(times)
    tflops = row["flops"] / row["ms"] / 1e9
    row["matmul_share"] = tflops / matmul_tflops(row["dtype"], row["device"])

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
    for backward in (False, True):
        for name, function in contenders(config.device).items():
            arguments = (function, q, k, v, grad, mask, config.dropout, backward)
            call = functools.partial(attend, *arguments)
            row = vars(config) | dict(contender=name, note="", call=call)
            row["case"] = "forward + backward" if backward else "forward"
            row["flops"] = (7 if backward else 2) * B * H * T * T * hs
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
            row = vars(config) | dict(contender=script.GPT.experiment, case=case, note="", call=None)
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
SETTING = ["batch_size", "block_size", "n_embd", "n_head", "n_layer", "dropout", "dtype"]
TIMES = ["peak_mib", "n", "ms", "ms_q1", "ms_q3", "flops", "matmul_share", "note", "device", "torch",
         "command"]
ATTENTION_COLUMNS = [*SETTING, "case", "contender", "error", *TIMES]
STEP_COLUMNS = [*SETTING, "case", "contender", "first_step_s", *TIMES]

def print_table(frame):
    """Print a frame of results in Markdown: a line per call that was timed, and the notes of the others."""
    settings = [name for name in SETTING if frame[name].nunique() > 1]
    numbers = ["ms", "ms_q1", "ms_q3", "peak_mib", "matmul_share"]
    if "first_step_s" in frame:
        numbers.append("first_step_s")
    done = frame[frame.note == ""]
    print(done[[*settings, "case", "contender", *numbers]].to_markdown(index=False, floatfmt=".4g"))
    print()
    failed = frame[frame.note != ""]
    for note in (failed.contender + ", " + failed.case + ": " + failed.note).unique():
        print(f"* {note}")

def plot(path, frame, panel_names, line_names, x):
    """Draw medians, quartiles and memory into a PNG: a panel per setting, and a line per kind of call."""
    from matplotlib.figure import Figure
    contenders = list(frame.contender.unique())
    panels = frame.groupby(panel_names, sort=False)
    figure = Figure(figsize=(3 + 4 * len(panels), 8), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
    figure.suptitle(f"{frame.device[0]}, torch {frame.torch[0]}")
    for (time_ax, memory_ax), (setting, panel) in zip(axes.T, panels):
        time_ax.set_title(", ".join(f"{name} {value}" for name, value in zip(panel_names, setting)))
        for names, line in panel.groupby(line_names, sort=False):
            color = f"C{contenders.index(names[0])}"
            style = "o:" if "forward" in names else "o-"
            errors = [line.ms - line.ms_q1, line.ms_q3 - line.ms]
            label = ", ".join(names)
            time_ax.errorbar(line[x], line.ms, errors, fmt=style, color=color, capsize=3, label=label)
            memory_ax.plot(line[x], line.peak_mib, style, color=color)
        time_ax.set_ylabel("milliseconds: median, quartiles")
        memory_ax.set_ylabel("MiB at the peak")
        if x == "case":
            time_ax.set_ylim(bottom=0)
            memory_ax.set_ylim(bottom=0)
            memory_ax.tick_params(axis="x", rotation=20)
        else:
            time_ax.set_yscale("log")
            memory_ax.set(xlabel=x, xscale="log", yscale="log")
            memory_ax.set_xticks(panel[x].unique(), panel[x].unique())
    figure.legend(handles=axes[0, 0].containers, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)

# --- Main ------------------------------------------------------------------------------------------------
def parse_args(argv):
    """The flags in argv as a Namespace; its flags are those of the scripts, one list per configuration."""
    step = "--step" in argv
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = gpt.fail
    devices = ["cpu"]
    if torch.cuda.is_available() and triton:
        devices = ["cuda", "cpu"]
    elif torch.cuda.is_available():
        gpt.warn("the CPU is timed, because timing a GPU needs Triton: pip install triton")
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
    if args.device == "cpu":
        others = ["--batch_size=4", *others]
    args.flags = []
    for T, n_head, dtype, dropout in itertools.product(args.T, args.n_head, args.dtype, args.dropout):
        args.flags.append([f"--device={args.device}", *others, f"--block_size={T}", f"--n_head={n_head}",
                           f"--dtype={dtype}", f"--dropout={dropout}"])
    for flags in args.flags:
        for script in SCRIPTS:
            config = script.parse_args(flags)
            if step:
                script.load_data(config)  # which ends the program if the text is missing or too short
    check_files(parser, args)
    return args

def check_files(parser, args):
    """Refuse what would fail after minutes of measuring."""
    for path in filter(None, (args.csv, args.plot)):
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.isdir(path) or not os.access(folder, os.W_OK):
            parser.error(f"{path} is a folder, or its folder does not exist or cannot be written to")
    packages = ["pandas", "tabulate"]
    if args.plot:
        packages.append("matplotlib")
    for package in packages:
        if not importlib.util.find_spec(package):
            parser.error(f"{package} is missing; pip install -r requirements.txt brings it")

def main():
    args = parse_args(sys.argv[1:])
    import pandas as pd
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as the scripts do
    device = f"a CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    command = " ".join(["python bench.py", *sys.argv[1:]])
    frames = []
    for flags in args.flags:
        print(*flags, file=sys.stderr)
        rows = time_steps(flags, args.rounds) if args.step else time_attention(flags, args.rounds)
        columns = STEP_COLUMNS if args.step else ATTENTION_COLUMNS
        frames.append(pd.DataFrame(rows).assign(device=device, torch=torch.__version__, command=command)
                      .reindex(columns=columns))
        frame = pd.concat(frames, ignore_index=True)
        if args.csv:  # each time: a run that is cut off keeps what it has
            frame.to_csv(args.csv, index=False)
    print(f"`{command}` on {device}, torch {torch.__version__}\n")
    print_table(frame)
    done = frame[frame.note == ""].reset_index()
    if args.plot and args.step:
        plot(args.plot, done, ["block_size", "n_head", "dropout"], ["contender"], "case")
    elif args.plot:
        plot(args.plot, done, ["dtype", "n_head", "dropout"], ["contender", "case"], "block_size")

if __name__ == "__main__":
    main()
