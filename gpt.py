"""The GPT of the lecture "Let's build GPT" (github.com/karpathy/ng-video-lecture): a Transformer that reads
Shakespeare a character at a time and learns to write the next one, with its attention spelled out by hand.

    python gpt.py --tiny    # for a laptop; without --tiny it is a model for a GPU
"""
import argparse, csv, io, math, os, sys, time

import torch
import torch.nn as nn
from torch.nn import functional as F

# --- Flags -----------------------------------------------------------------------------------------------

TINY = dict(batch_size=16, block_size=96, n_embd=128, n_head=4, n_layer=2, dropout=0.0, learning_rate=1.5e-3,
            max_iters=2000, eval_interval=500, eval_iters=100)

# The header of the CSV, the same in all three scripts: what a script has no flag for stays empty.
COLUMNS = ("experiment,pe_type,n_embd,n_head,n_layer,train_loss,val_loss,best_val_loss,best_iter,"
           "published_train_loss,published_val_loss,pe_at,data,batch_size,block_size,max_iters,eval_interval,"
           "eval_iters,learning_rate,warmup_iters,min_lr,weight_decay,beta2,grad_clip,grad_accum,dropout,"
           "seed,dtype,compile,params,device,torch,compile_s,train_s,ms_per_iter,tokens_per_s,"
           "peak_mem_mb").split(",")


def fail(message, status=2):
    """End the program with one line on standard error; 2: it needs other flags or files, 1: it went wrong."""
    message = " ".join(message.splitlines())  # a name in it may have line breaks
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    sys.exit(status)


def number(kind, low, below=math.inf):
    """An argparse type: an int or a float in [low, below)."""
    def parse(text):
        if not low <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in the range [{low}, {below})")
        return kind(text)
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def parse_args(argv=None):
    """The flags in argv (a list of strings, by default the command line) as a Namespace, checked."""
    if argv is None:  # a notebook's kernel is started with flags of its own
        argv = [] if sys.argv[0].endswith("kernel_launcher.py") else sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: fail(f"{message}; --help lists the flags and what they take")
    flag, count = parser.add_argument, number(int, 1, 10**12)
    flag("--data", default="input.txt", help="text to learn from, UTF-8")
    flag("--batch_size", type=count, default=64, help="sequences per iteration")
    flag("--block_size", type=count, default=256, help="context length in characters")
    flag("--max_iters", type=count, default=5000, help="training iterations")
    flag("--eval_interval", type=count, default=500, help="iterations between evaluations")
    flag("--eval_iters", type=count, default=200, help="batches per split in an evaluation")
    flag("--learning_rate", type=number(float, 0), default=3e-4, help="AdamW's step size")
    flag("--n_embd", type=count, default=384, help="channels per token, a multiple of n_head")
    flag("--n_head", type=count, default=6, help="attention heads")
    flag("--n_layer", type=count, default=6, help="Transformer blocks")
    flag("--dropout", type=number(float, 0, 1), default=0.2, help="share of activations dropped in training")
    flag("--seed", type=number(int, 0, 2**63), default=1337, help="of weights, batches and dropout")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto is cuda, else mps, else cpu")
    flag("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto is bfloat16 if fast")
    flag("--compile", action=argparse.BooleanOptionalAction, default="auto", help="auto is yes on cuda")
    flag("--csv", help="append a row with the final losses to this file")
    flag("--sample_chars", type=number(int, 0, 10**12), default=500, help="characters to write at the end")
    flag("--tiny", action="store_true", help=f"preset for a laptop, other flags win: {TINY}")
    if "--tiny" in argv:
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if args.n_embd % args.n_head:
        fail(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}")
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    try:
        args.device = torch.device(devices[0] if args.device == "auto" else args.device)
        torch.zeros(1, device=args.device)
        if args.device.type not in devices:
            raise RuntimeError
    except (RuntimeError, AssertionError, ImportError):
        fail(f"--device {args.device} is not there; this machine has {', '.join(devices)}")
    if args.dtype == "auto":
        fast = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False), "mps": lambda: False,
                "cpu": lambda: torch.cpu.get_capabilities().get("avx512_bf16", False)}
        args.dtype = "bfloat16" if fast[args.device.type]() else "float32"
    if args.compile == "auto":
        args.compile = args.device.type == "cuda"
    return args


# --- Data ------------------------------------------------------------------------------------------------

def load_data(config):
    """Read the text -> {"train": (N,), "val": (M,)} token ids on the device, and the list of characters."""
    try:
        with open(config.data, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--data {config.data}: {error}; it has to be a text in UTF-8")
    chars = sorted(set(text))
    ids = {char: i for i, char in enumerate(chars)}
    tokens = torch.tensor([ids[char] for char in text], dtype=torch.long, device=config.device)
    n = int(0.9 * len(tokens))
    if min(n, len(tokens) - n) <= config.block_size:
        fail(f"--data {config.data}: {n} characters to train on and {len(tokens) - n} to validate; "
             f"--block_size {config.block_size} needs more than {config.block_size} of each")
    return {"train": tokens[:n], "val": tokens[n:]}, chars


def get_batch(data, config, generator):
    """Random windows of data (N,) -> inputs (B, T) and targets (B, T), the inputs shifted by one."""
    start = torch.randint(len(data) - config.block_size, (config.batch_size, 1), generator=generator,
                          device=config.device)
    window = data[start + torch.arange(config.block_size + 1, device=config.device)]  # (B, T+1)
    return window[:, :-1], window[:, 1:]


# --- Model -----------------------------------------------------------------------------------------------

class Head(nn.Module):
    """One head of causal self-attention (Vaswani et al. 2017): (B, T, C) -> (B, T, hs)."""

    def __init__(self, config):
        super().__init__()
        head_size = config.n_embd // config.n_head
        self.key = nn.Linear(config.n_embd, head_size, bias=False)
        self.query = nn.Linear(config.n_embd, head_size, bias=False)
        self.value = nn.Linear(config.n_embd, head_size, bias=False)
        self.dropout = Dropout(config.dropout)
        tril = torch.tril(torch.ones(config.block_size, config.block_size, dtype=torch.bool))
        self.register_buffer("tril", tril, persistent=False)

    def forward(self, x):
        k, q, v = self.key(x), self.query(x), self.value(x)  # (B, T, hs)
        T = x.shape[1]
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, hs) @ (B, hs, T) -> (B, T, T)
        scores = scores.masked_fill(~self.tril[:T, :T], float("-inf"))  # a token sees no later one
        weights = self.dropout(F.softmax(scores, dim=-1))  # (B, T, T)
        return weights @ v  # (B, T, T) @ (B, T, hs) -> (B, T, hs)


class MultiHeadAttention(nn.Module):
    """Heads side by side, their outputs concatenated and mixed: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.heads = nn.ModuleList(Head(config) for _ in range(config.n_head))
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        out = torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, C)
        return self.dropout(self.proj(out))


class FeedForward(nn.Module):
    """Two layers, applied to each token by itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.ReLU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
            Dropout(config.dropout),
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    """Communication, then computation: (B, T, C) -> (B, T, C)."""

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


class Dropout(nn.Dropout):
    """nn.Dropout, faster on a CPU: random numbers are drawn there one by one, so each serves four times."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        drawn = torch.randint(-2**63, 2**63 - 1, (x.numel() // 4 + 1,))  # 64 random bits each
        uniform = drawn.view(torch.int16)[:x.numel()].view(x.shape)  # 16 of them each: in [-2**15, 2**15)
        keep = (uniform >= self.p * 2**16 - 2**15).to(x.dtype)
        return x * keep.div_(1 - self.p)


class GPT(nn.Module):
    """The language model; config has vocab_size, block_size, n_embd, n_head, n_layer and dropout."""

    experiment = "gpt"

    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size), and the mean cross-entropy in nats given targets."""
        tok_emb = self.token_embedding_table(idx)  # (B, T, C)
        pos_emb = self.position_embedding_table.weight[:idx.shape[1]]  # (T, C)
        x = self.blocks(tok_emb + pos_emb)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Continue idx (B, T) token by token -> (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.block_size:])  # the positions the model knows
            probs = F.softmax(logits[:, -1], dim=-1)  # (B, vocab_size), of what follows the last token
            idx = torch.cat((idx, torch.multinomial(probs, num_samples=1)), dim=1)
        return idx


# --- Evaluation ------------------------------------------------------------------------------------------

def autocast(config):
    """Matrix products in config.dtype, those inside SDPA too; the weights stay in float32."""
    # Where SDPA has no fused kernel, as on a CPU with dropout, it would go back to float32 by itself.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(config.device.type == "cpu")
    return torch.autocast(config.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.no_grad()
def estimate_loss(model, splits, config, attention_dropout=False):
    """Mean loss of each split, {"train": nats, "val": nats}, over batches that are the same at every call.

    attention_dropout=True leaves the dropout inside SDPA on, as the published runs of gpt_v2 and gpt_v3 did.
    """
    model.eval()
    if attention_dropout:  # an nn.Dropout knows eval mode by itself; the function SDPA does not
        for module in model.modules():
            module.training = not isinstance(module, nn.Dropout)
    losses = {}
    for split, data in splits.items():
        generator = torch.Generator(config.device).manual_seed(0)
        total = torch.zeros((), device=config.device)
        for _ in range(config.eval_iters):
            with autocast(config):
                total += model(*get_batch(data, config, generator))[1]
        losses[split] = round(total.item() / config.eval_iters, 6)
    model.train()
    return losses


# --- Results ---------------------------------------------------------------------------------------------

def time_left(step, iter_s, eval_s, config):
    """From this step to the end, evaluations included, as minutes:seconds."""
    evals = math.ceil((config.max_iters - step) / config.eval_interval)
    return "{}:{:02}".format(*divmod(round((config.max_iters - step) * iter_s + evals * eval_s), 60))


def report(step, losses, batch_losses, iter_s, eval_s, config):
    """Print the line of an evaluation; end the run if a loss of it, or of a batch before, is not finite."""
    bad = [i for i, loss in enumerate(batch_losses) if not math.isfinite(loss)]
    if bad or not math.isfinite(losses["train"] + losses["val"]):
        since = (step - 1) // config.eval_interval * config.eval_interval
        fail(f"the loss is not finite at step {since + bad[0] if bad else step}; a --learning_rate below "
             f"{config.learning_rate:g} may help", status=1)
    tokens_per_s = config.batch_size * config.block_size / iter_s
    speed = f"{1e3 * iter_s:.2f} ms/iter, {tokens_per_s / 1e6:.2f}M tok/s, " if step else ""
    print(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f} | {speed}"
          f"eta {time_left(step, iter_s, eval_s, config)}", flush=True)


@torch.compiler.set_stance("force_eager")  # for one evaluation compiling does not pay
def result_row(model, splits, config, compile_s, train_s, iter_s, **losses):
    """The row of a finished run: its flags, its losses, and those as published, with attention dropout on."""
    published = estimate_loss(model, splits, config, attention_dropout=True)
    memory = torch.cuda.max_memory_allocated(config.device) >> 20 if config.device.type == "cuda" else ""
    return vars(config) | losses | dict(
        experiment=model.experiment, pe_type=getattr(config, "pe", "None"), torch=torch.__version__,
        published_train_loss=published["train"], published_val_loss=published["val"],
        compile_s=round(compile_s, 2), train_s=round(train_s, 2), ms_per_iter=round(1e3 * iter_s, 3),
        tokens_per_s=round(config.batch_size * config.block_size / iter_s), peak_mem_mb=memory)


def append_row(path, row=None):
    """Append the dict row to a CSV of COLUMNS; without a row, only see to it that this will be possible.

    One write, locked on POSIX: runs side by side tear no line, and a full disk leaves the file as it was.
    """
    text = io.StringIO()
    cells = [row.get(name, "") for name in COLUMNS] if row else []
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, cells])
    header, line = text.getvalue().encode(errors="surrogateescape").split(b"\n", 1)
    try:
        if row is None and not os.path.exists(path):
            if not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise OSError("its folder is not there or cannot be written to")
            return
        with open(path, "r+b" if row is None else "a+b", buffering=0) as file:
            if os.name == "posix":
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            for start, text in ((0, header + b"\n"), (size - 1, b"\n")) if size else ():
                file.seek(start)
                if file.read(len(text)) != text:
                    raise ValueError("it is not a whole CSV of these scripts; name one or a new file")
            new = b"" if row is None else line if size else header + b"\n" + line
            if file.write(new) < len(new):
                file.truncate(size)
                raise OSError("no space left on the disk")
    except (OSError, ValueError) as error:
        kept = f"; the row was {line.decode(errors='replace').strip()}" if row else ""
        fail(f"--csv {path}: {error}{kept}", status=1 if row else 2)


# --- Training --------------------------------------------------------------------------------------------

def out_of_memory(error):
    """Whether this RuntimeError is a failed allocation, on a GPU or on the CPU."""
    return "out of memory" in str(error) or "tried to allocate" in str(error)


def compile_blocks(model, config):
    """Block by block, in place: one graph serves every layer, and the weights keep their names."""
    # A CPU draws random numbers faster in eager mode, and inductor's test of its vector unit takes seconds.
    options = {"fallback_random": True, "cpp.vec_isa_ok": True} if config.device.type == "cpu" else {}
    for block in model.blocks:
        block.compile(options=options)


def warm_up(model, x, y, config):
    """Compile, or run out of memory, before the clock starts, and say what is going to run.

    Returns compile_s, the seconds of the passes that compiled, if any did, and iter_s, those of an iteration.
    """
    if config.compile:
        torch.compiler.reset()  # Dynamo keeps eight graphs of a block; earlier models in a notebook count
        torch.compiler.set_stance("default")
        print(f"{model.experiment}: compiling, which takes longest the first time", flush=True)
        compile_blocks(model, config)
    seconds = []
    for training in (True, False, True):  # the graph of a training pass, that of an evaluation, no graph
        started = time.perf_counter()
        try:
            with autocast(config), torch.set_grad_enabled(training):
                _, loss = model.train(training)(x, y)
            if training:
                loss.backward()
            loss.item()  # waits for the device
        except RuntimeError as error:
            if out_of_memory(error) or not config.compile:
                raise
            print(f"warning: going on without --compile: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.compiler.set_stance("force_eager")
            config.compile = False
            return warm_up(model, x, y, config)
        seconds.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    compile_s, iter_s = sum(seconds[:2]) * config.compile, seconds[2] * getattr(config, "grad_accum", 1)
    config.params = sum(p.numel() for p in model.parameters())
    print(f"{model.experiment}: {config.params / 1e6:.2f}M parameters, {config.device}, {config.dtype}, "
          + (f"compiled in {compile_s:.1f} s" if config.compile else "eager"), flush=True)
    if config.device.type == "cpu" and not config.tiny:
        print(f"this will take about {time_left(-1, iter_s, config.eval_iters * iter_s, config)} "
              "(minutes:seconds) on the CPU; --tiny takes a minute or two", flush=True)
    return compile_s, iter_s


def train(config):
    """Train a GPT as the flags say, report and append its losses -> the model, the list of characters."""
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    splits, chars = load_data(config)
    config.vocab_size = len(chars)
    model = GPT(config).to(config.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    batches = torch.Generator(config.device).manual_seed(config.seed)
    compile_s, iter_s = warm_up(model, *get_batch(splits["train"], config, batches), config)
    best_val, best_iter, train_s, eval_s = math.inf, 0, 0.0, 0.0
    recent = torch.zeros(min(config.eval_interval, config.max_iters), device=config.device)  # batch losses
    started = drawn = time.perf_counter()
    for step in range(config.max_iters + 1):
        if step % config.eval_interval == 0 or step == config.max_iters:
            batch_losses = recent.tolist()  # waits for the device
            train_s += time.perf_counter() - started
            started = time.perf_counter()
            losses = estimate_loss(model, splits, config)
            eval_s = time.perf_counter() - started
            iter_s = train_s / step if step else iter_s
            report(step, losses, batch_losses, iter_s, eval_s, config)
            if losses["val"] < best_val:
                best_val, best_iter = losses["val"], step
            started = time.perf_counter()
        if step == config.max_iters:
            break
        x, y = get_batch(splits["train"], config, batches)
        with autocast(config):
            logits, loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        recent[step % config.eval_interval] = loss.detach()  # unread until an evaluation: reading waits
        if sys.stdout.isatty() and time.perf_counter() > drawn + 0.5:
            drawn = time.perf_counter()
            print(f"step {step}/{config.max_iters}, eta {time_left(step, iter_s, eval_s, config)} ", end="\r")

    print(f"final: train loss {losses['train']:.4f}, val loss {losses['val']:.4f} "
          f"(best {best_val:.4f} at step {best_iter})", flush=True)
    if config.csv:
        append_row(config.csv, result_row(
            model, splits, config, train_loss=losses["train"], val_loss=losses["val"], best_val_loss=best_val,
            best_iter=best_iter, compile_s=compile_s, train_s=train_s, iter_s=iter_s))
    return model, chars


# --- Sample ----------------------------------------------------------------------------------------------

@torch.compiler.set_stance("force_eager")  # every length is new: nothing to compile for
def sample(model, chars, config):
    """The first character, a new line, and config.sample_chars more that the model draws in eval mode."""
    start = torch.zeros((1, 1), dtype=torch.long, device=config.device)
    return "".join(chars[i] for i in model.eval().generate(start, config.sample_chars)[0].tolist())


def main():
    config = parse_args()
    if config.csv:
        append_row(config.csv)
    try:
        print(sample(*train(config), config))
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fail(f"out of memory: lower --batch_size {config.batch_size} or --block_size {config.block_size}")


if __name__ == "__main__":
    main()
