"""Changes from gpt.py: attention is a single call of F.scaled_dot_product_attention (SDPA), which runs as one
fused kernel where PyTorch has one. It never writes the (T, T) scores to memory, and needs no mask.

    python gpt_v2.py --tiny    # a model for a laptop; without --tiny, it is one for a GPU
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy"]
# ///
import argparse, contextlib, csv, math, os, shutil, signal, sys, time, zlib
import torch
import torch.nn as nn
from torch.nn import functional as F

# --- Model -----------------------------------------------------------------------------------------------

class Head(nn.Module):
    """One head of causal self-attention (Vaswani et al. 2017): (B, T, C) -> (B, T, hs)."""
    def __init__(self, config):
        super().__init__()
        head_size = config.n_embd // config.n_head
        self.key = nn.Linear(config.n_embd, head_size, bias=False)
        self.query = nn.Linear(config.n_embd, head_size, bias=False)
        self.value = nn.Linear(config.n_embd, head_size, bias=False)
        self.dropout = config.dropout

    def forward(self, x):
        k = self.key(x)  # (B, T, hs)
        q = self.query(x)  # (B, T, hs)
        v = self.value(x)  # (B, T, hs)
        k, q, v = k.unsqueeze(1), q.unsqueeze(1), v.unsqueeze(1)  # (B, 1, T, hs), as fused kernels expect
        dropout = self.dropout if self.training else 0.0  # a function cannot know about eval mode
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, 1, T, hs)
        return y.squeeze(1)

class MultiHeadAttention(nn.Module):
    """Heads in parallel, their outputs concatenated and projected: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.heads = nn.ModuleList(Head(config) for _ in range(config.n_head))
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = torch.cat([head(x) for head in self.heads], dim=-1)  # n_head times (B, T, hs) -> (B, T, C)
        return self.dropout(self.proj(x))

class FeedForward(nn.Module):
    """Two linear layers with a ReLU in between, applied to each token on its own: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.ReLU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.dropout),
        )

    def forward(self, x):
        return self.net(x)

class Block(nn.Module):
    """Communication between the tokens, then computation on each: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.sa = MultiHeadAttention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ffwd = FeedForward(config)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        x = x + self.ffwd(self.ln2(x))
        return x

class GPT(nn.Module):
    """The language model; config has block_size, n_embd, n_head, n_layer and dropout."""
    experiment = "gpt_v2"

    def __init__(self, config, vocab_size):
        super().__init__()
        torch.backends.cuda.enable_cudnn_sdp(False)  # so training and evaluation use the same kernel on a GPU
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # without a fused kernel, keep bfloat16
        self.block_size = config.block_size
        self.token_embedding_table = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, vocab_size)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # the weight of a Linear or an Embedding
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets, the loss in nats per token."""
        tok_emb = self.token_embedding_table(idx)  # (B, T, C)
        pos_emb = self.position_embedding_table.weight[:idx.shape[1]]  # (T, C)
        x = self.blocks(tok_emb + pos_emb)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Continue idx (B, T) token by token -> (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            context = idx[:, -self.block_size:]  # there are no more positions than that
            logits, _ = self(context)
            probs = F.softmax(logits[:, -1], dim=-1)  # (B, vocab_size), for what follows the last token
            idx_next = torch.multinomial(probs, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T+1)
        return idx

# --- Data ------------------------------------------------------------------------------------------------
def load_data(config):
    """The text as token ids to train on (N,) and to validate on (M,), its characters, and its CRC-32."""
    try:
        with open(config.data, encoding="utf-8-sig") as file:  # a byte order mark is not part of the text
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--data {config.data}: {error}; any text in UTF-8 will do, and tiny Shakespeare is at "
             "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
    chars = sorted(set(text))
    ids = {char: i for i, char in enumerate(chars)}
    tokens = torch.tensor([ids[char] for char in text], device=config.device)
    n = int(0.9 * len(tokens))
    if len(tokens) - n <= config.block_size:
        fail(f"--data {config.data}: a tenth of it must be longer than --block_size {config.block_size}")
    return tokens[:n], tokens[n:], chars, zlib.crc32(text.encode())

def get_batch(data, start, block_size):
    """Windows of data (N,) that begin at start (B,) -> inputs (B, T), and targets (B, T) one token later."""
    window = data[start[:, None] + torch.arange(block_size + 1, device=data.device)]  # (B, T+1)
    return window[:, :-1], window[:, 1:]

# --- Loss and evaluation ---------------------------------------------------------------------------------
def compute_loss(model, data, start, config):
    """The mean loss on the windows of data (N,) that begin at start (B,), in nats per token."""
    x, y = get_batch(data, start, config.block_size)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        _, loss = model(x, y)
    return loss

@torch.no_grad()
def estimate_loss(model, data, config, stops=()):
    """The mean loss on evenly spaced windows of data (N,), in nats per token: the same at every call.
    It is cut short once stops is not empty: the run is about to end."""
    model.eval()
    count = config.eval_iters * config.batch_size
    last = len(data) - config.block_size - 1
    starts = torch.arange(count, device=data.device) * last // max(1, count - 1)  # from 0 to last
    losses = []
    for start in starts.split(config.batch_size):
        losses.append(compute_loss(model, data, start, config))
        if stops:
            break
    model.train()
    return round(torch.stack(losses).mean().item(), 6)

# --- Flags -----------------------------------------------------------------------------------------------
TINY = dict(batch_size=16, block_size=96, max_iters=2000, eval_interval=500, eval_iters=100,
            learning_rate=1.5e-3, n_embd=128, n_head=4, n_layer=2, dropout=0.0)

def warn(message):
    """Print message as a line on standard error, in place of the progress line."""
    with contextlib.suppress(OSError):  # nobody can read it
        print(f"{erase()}{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)

def fail(message, status=2):
    """End the program with one line on standard error; status 2 means a wrong flag or file."""
    warn("error: " + " ".join(message.split()))
    sys.exit(status)

def between(low, high, kind=int):
    """The type of a flag: a number from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, not {text}")
        return value
    return number

def flag(group, name, default, help, type=between(1, 10**9)):
    group.add_argument(name, default=default, help=f"{help} (default: {default})", type=type)

def shaping_flags():
    """The flags that shape a run; its row in --csv holds them."""
    parser = argparse.ArgumentParser(add_help=False)
    model = parser.add_argument_group("model")
    flag(model, "--block_size", 256, "context length in characters")
    flag(model, "--n_embd", 384, "channels per token, a multiple of n_head")
    flag(model, "--n_head", 6, "attention heads")
    flag(model, "--n_layer", 6, "Transformer blocks")
    flag(model, "--dropout", 0.2, "dropout probability", between(0, 0.99, float))
    training = parser.add_argument_group("training")
    flag(training, "--batch_size", 64, "sequences per iteration")
    flag(training, "--max_iters", 5000, "training iterations")
    flag(training, "--eval_interval", 500, "iterations between evaluations")
    flag(training, "--eval_iters", 200, "batches of each split per evaluation")
    flag(training, "--learning_rate", 3e-4, "learning rate of AdamW", between(0, 10, float))
    flag(training, "--seed", 1337, "random seed of weights, batches and dropout", between(0, 2**63 - 1))
    training.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                          help="precision of matrix products; auto: bfloat16 where it is fast")
    return parser

def parse_args(argv=None):
    """The flags in argv, a list of strings (default: the command line), as a Namespace."""
    if argv is None:
        argv = [] if in_notebook() else sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, parents=[shaping_flags()],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [accelerator.type, "cpu"] if accelerator else ["cpu"]
    run = parser.add_argument_group("run")
    flag(run, "--data", "input.txt", "text to train on, in UTF-8", str)
    run.add_argument("--device", choices=devices, default=devices[0],
                     help=f"where to compute (default: {devices[0]})")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction,
                     help="compile the blocks (default: only on cuda)")
    run.add_argument("--csv", help="file to append a row with the final losses to")
    run.add_argument("--once", action="store_true", help="do nothing if --csv has a row of this run")
    flag(run, "--max_new_tokens", 500, "length of the sample", between(0, 10**9))
    run.add_argument("--tiny", action="store_true", help="laptop preset; other flags override it")
    if "--tiny" in argv:
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}")
    if args.dtype == "auto":
        fast = torch.cpu.get_capabilities().get("avx512_bf16")
        if args.device == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if fast else "float32"
    if args.compile is None:
        args.compile = args.device == "cuda"
    return args

def in_notebook():
    """Whether a Jupyter kernel runs this: sys.argv is then the kernel's, and we must not exit."""
    return sys.argv[0].endswith("kernel_launcher.py")

# --- Training --------------------------------------------------------------------------------------------
def on_terminal():
    if sys.stdout is None:  # it is closed
        return False
    return sys.stdout.isatty()

def erase():
    """The characters that erase the progress line on a terminal."""
    return "\r\x1b[K" if on_terminal() else ""

def log(text, config, end="\n"):
    """Print text in place of the progress line. With --csv, a run continues when nobody can read it."""
    try:
        print(f"{erase()}{text}", end=end, flush=True)
    except OSError:  # a closed pipe, as after `| head`, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not config.csv:
            sys.exit(1)

def catch_signals(stops):
    """A context in which Ctrl-C, SIGTERM and SIGHUP are only appended to stops, a list."""
    def stop(number, frame):
        stops.append(number)
        signal.signal(number, signal.default_int_handler)  # a second one ends the run at once

    undo = contextlib.ExitStack()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            undo.callback(signal.signal, number, signal.signal(number, stop))
    return undo

def compile_blocks(model, data, config):
    """Compile each block in place: all layers share the code, and the weights keep their names."""
    if not config.compile:
        return
    start = data.new_zeros(config.batch_size)
    try:
        torch.compiler.reset()  # forget the models that a notebook compiled before
        torch.compiler.set_stance("default")
        for block in model.blocks:
            block.compile()
        compute_loss(model, data, start, config).backward()
        with torch.no_grad():  # evaluation is compiled separately
            compute_loss(model.eval(), data, start, config)
        if config.device == "cuda":
            record_graphs(model.train(), config)
    except Exception as error:  # no C++ compiler, no Triton, an old GPU
        warn(f"warning: continuing without --compile: {str(error).splitlines()[0]}")
        torch.compiler.set_stance("force_eager")
    model.train()
    model.zero_grad(set_to_none=True)

def record_graphs(model, config):
    """Record the forward and the backward pass of a training batch as CUDA graphs, of one launch each.
    Launching them kernel by kernel takes the CPU longer than computing them takes the GPU."""
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # graphs have their own stream
    x = torch.zeros(config.batch_size, config.block_size, dtype=torch.long, device=config.device)
    y = x.clone()
    with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16",
                        cache_enabled=False):
        torch.cuda.make_graphed_callables(model, (x, y))

def training_step(model, optimizer, data, generator, config):
    """Draw a batch from data (N,) and update the model once."""
    start = torch.randint(len(data) - config.block_size, (config.batch_size,), generator=generator,
                          device=config.device)
    loss = compute_loss(model, data, start, config)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()

class Clock:
    """A stopwatch that waits for the device to finish its work."""
    def __init__(self, config):
        self.device = config.device
        self.last = time.perf_counter()

    def lap(self):
        """Seconds since the last lap."""
        if self.device != "cpu":
            torch.accelerator.synchronize()
        start = self.last
        self.last = time.perf_counter()
        return self.last - start

def speed(step, train_s, eval_s, config):
    """Speed and remaining time, given the seconds of the training so far and of one evaluation."""
    if step == 0:
        return ""
    iter_s = train_s / step
    rate = config.batch_size * config.block_size / iter_s
    tokens = f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.0f}k"
    left = config.max_iters - step
    eta = round(left * iter_s + math.ceil(left / config.eval_interval) * eval_s)
    return f" | {1e3 * iter_s:.2f} ms/iter, {tokens} tok/s, eta {eta // 60}:{eta % 60:02}"

def progress(text, config):
    """Print text as a line, or on a terminal as the progress line, cut to its width."""
    if on_terminal():
        width = shutil.get_terminal_size().columns - 1
        log(text[:width], config, end="")
    else:
        log(text, config)

def announce(model, config):
    mode = "compiled" if config.compile else "eager"
    size = f"{count_parameters(model) / 1e6:.2f}M parameters"
    log(f"{model.experiment}: {size}, {config.device}, {config.dtype}, {mode}", config)
    if config.device == "cpu" and not config.compile and not config.tiny:
        log("--tiny is a preset for a laptop", config)

def count_parameters(model):
    return sum(p.numel() for p in model.parameters())

def train(config, stops=None):
    """Train a GPT as the flags say, and report its losses -> model, chars (the text of each token).
    Ctrl-C, SIGTERM or SIGHUP ends the training early, and is appended to stops, a list."""
    stops = [] if stops is None else stops
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    train_data, val_data, chars, crc32 = load_data(config)
    check_csv(config, crc32)
    model = GPT(config, len(chars)).to(config.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    announce(model, config)
    compile_blocks(model, train_data, config)

    curve = {}  # step: (train loss, val loss)
    train_s = 0.0  # seconds, without compiling and evaluation
    clock = Clock(config)
    with catch_signals(stops):
        for step in range(config.max_iters + 1):
            if stops:
                break
            if step % config.eval_interval == 0 or step == config.max_iters:
                train_s += clock.lap()
                train_loss = estimate_loss(model, train_data, config, stops)
                val_loss = estimate_loss(model, val_data, config, stops)
                eval_s = clock.lap()
                if stops:
                    break
                curve[step] = (train_loss, val_loss)
                log(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                    f"{speed(step, train_s, eval_s, config)}", config)
                if not math.isfinite(train_loss + val_loss):
                    fail(f"the loss is not finite at step {step}; a lower --learning_rate may help", 1)
            elif step == 10 or (step % 10 == 0 and on_terminal()):
                train_s += clock.lap()
                progress(f"step {step}{speed(step, train_s, eval_s, config)}", config)
            if step < config.max_iters:
                training_step(model, optimizer, train_data, generator, config)
    vars(model).pop("forward", None)  # drop the CUDA graphs, which only accept training batches
    if stops:
        warn(f"stopped at step {step}")
    else:
        report(model, curve, train_s, crc32, config)
    return model.eval(), chars

# --- Results ---------------------------------------------------------------------------------------------
COLUMNS = """experiment pe_type n_embd n_head n_layer train_loss val_loss best_val_loss best_iter
    published_train_loss published_val_loss params ms_per_iter train_s device torch data data_crc32 flags
    curve""".split()  # the same in all three scripts

def run_flags(config):
    """The flags that shape a run, as a command line: with --data, it repeats the run."""
    names = vars(shaping_flags().parse_args([]))
    return " ".join(f"--{name} {getattr(config, name)}" for name in names)

def report(model, curve, train_s, crc32, config):
    """Print the final losses, and append the row of the run to --csv."""
    train_loss, val_loss = curve[config.max_iters]
    best_iter = min(curve, key=lambda step: curve[step][1])
    best_val_loss = curve[best_iter][1]
    log(f"final: train loss {train_loss:.4f}, val loss {val_loss:.4f} "
        f"(best {best_val_loss:.4f} at step {best_iter})", config)
    if config.csv:
        points = [f"{step}:{train:.4f}:{val:.4f}" for step, (train, val) in curve.items()]
        append_row(config.csv, vars(config) | dict(
            experiment=model.experiment,
            pe_type="learned",
            train_loss=train_loss,
            val_loss=val_loss,
            best_val_loss=best_val_loss,
            best_iter=best_iter,
            params=count_parameters(model),
            train_s=round(train_s, 2),
            ms_per_iter=round(1e3 * train_s / config.max_iters, 3),
            torch=torch.__version__,
            data=os.path.basename(config.data),
            data_crc32=crc32,
            flags=run_flags(config),
            curve=" ".join(points),
        ))

def append_row(path, row=None):
    """Append row, a dict, to a CSV of COLUMNS; without a row, only check the file.
    It is locked meanwhile, so that parallel runs cannot tear each other's rows."""
    try:
        with open(path, "a+", newline="", encoding="utf-8") as file:
            if os.name == "posix":
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            if text and text.split("\n")[0] != ",".join(COLUMNS):
                raise ValueError("its columns are different")
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            if not text:
                writer.writeheader()
            elif not text.endswith("\n"):
                file.write("\n")  # a full disk cut off the last row
            if row:
                writer.writerow(row)
    except (OSError, ValueError) as error:
        fail(f"--csv {path}: {error}; the row: {row}", 1 if row else 2)

def check_csv(config, crc32):
    """Check --csv. With --once, exit if it already has the row of this script, these flags and this text."""
    if not config.csv:
        return
    append_row(config.csv)
    run = dict(experiment=GPT.experiment, flags=run_flags(config), data_crc32=str(crc32))
    with open(config.csv, newline="", encoding="utf-8") as file:
        exists = any(run.items() <= row.items() for row in csv.DictReader(file))
    if exists and config.once:
        log(f"nothing to do: {config.csv} has the row of this run", config)
        sys.exit(0)

# --- Sample and main -------------------------------------------------------------------------------------
def sample(model, chars, config):
    """Print text that the model generates, beginning with the first of chars."""
    if config.compile:
        torch.compiler.set_stance("force_eager")  # each length is new, and not worth compiling for
    idx = torch.zeros(1, 1, dtype=torch.long, device=config.device)  # (B, T)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        idx = model.generate(idx, config.max_new_tokens)
    log("".join(chars[token] for token in idx[0]), config)

def main():
    """Train and sample as the command line says -> model, chars."""
    config = parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a character that cannot be shown becomes "?"
    model, chars = None, None
    stops = []
    try:
        model, chars = train(config, stops)
        if config.max_new_tokens and not stops:
            sample(model, chars, config)
    except KeyboardInterrupt:
        warn("stopped by Ctrl-C")
        stops.append(signal.SIGINT)
    except torch.OutOfMemoryError:
        fail(f"out of memory: lower --batch_size {config.batch_size} or --block_size {config.block_size}", 1)
    if stops and not in_notebook():
        sys.exit(128 + stops[0])
    return model, chars

if __name__ == "__main__":
    model, chars = main()
