"""Changes from gpt_v2.py: one projection (with bias) and one batch for all heads (CausalSelfAttention, as in
makemore), GELU for ReLU, positional encodings (--pe, --pe_at), no bias in lm_head, a learning rate schedule.
A run can be saved (--save), gone on with (--resume), sampled (--generate) and spread over GPUs (torchrun).

    python gpt_v3.py --tiny --pe rope --pe_at qk    # for a laptop; without --tiny it is a model for a GPU
"""
import argparse, contextlib, csv, io, math, os, signal, sys, time, warnings, zipfile

import torch
import torch.nn as nn
from torch.nn import functional as F

# --- Flags -----------------------------------------------------------------------------------------------

TINY = dict(batch_size=16, block_size=96, n_embd=128, n_head=4, n_layer=2, dropout=0.0, learning_rate=1.2e-2,
            max_iters=2100, eval_interval=700, eval_iters=100, warmup_iters=100, min_lr=1e-4,
            weight_decay=0.1, beta2=0.99)

# The header of the CSV, the same in all three scripts: what a script has no flag for stays empty.
COLUMNS = ("experiment,pe_type,n_embd,n_head,n_layer,train_loss,val_loss,best_val_loss,best_iter,"
           "published_train_loss,published_val_loss,pe_at,data,batch_size,block_size,max_iters,eval_interval,"
           "eval_iters,learning_rate,warmup_iters,min_lr,weight_decay,beta2,grad_clip,grad_accum,dropout,"
           "seed,dtype,compile,params,device,torch,compile_s,train_s,ms_per_iter,tokens_per_s,"
           "peak_mem_mb").split(",")

# The flags that a saved run keeps, and those of them that its model cannot change.
SHAPE = "n_embd n_head n_layer block_size pe pe_at".split()
KEPT = [*SHAPE, *COLUMNS[COLUMNS.index("data"):COLUMNS.index("compile")]]


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
    flag("--pe", choices=["randn", "sinpe", "rope"], default="sinpe", help="positional encoding")
    flag("--pe_at", choices=["input", "qk"], default="input", help="of embeddings, or of q and k in heads")
    flag("--warmup_iters", type=number(int, 0, 10**12), default=0, help="iterations of linear warm-up")
    flag("--min_lr", type=number(float, 0), help="decay to it by a cosine; None keeps the rate constant")
    flag("--weight_decay", type=number(float, 0), default=0.01, help="AdamW's")
    flag("--beta2", type=number(float, 0, 1), default=0.999, help="AdamW's memory of squared gradients")
    flag("--grad_clip", type=number(float, 0), default=0.0, help="limit to the gradient's norm; 0 is none")
    flag("--grad_accum", type=count, default=1, help="parts that a batch is split into to save memory")
    flag("--seed", type=number(int, 0, 2**63), default=1337, help="of weights, batches and dropout")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto is cuda, else mps, else cpu")
    flag("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto is bfloat16 if fast")
    flag("--compile", action=argparse.BooleanOptionalAction, default="auto", help="auto is yes on cuda")
    flag("--csv", help="append a row with the final losses to this file")
    flag("--save", help="keep the run in this file, and its best state in FILE.best, at every evaluation")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--resume", help="go on with the run in this file, and keep it there")
    one("--generate", help="write text with the model in this file")
    flag("--prompt", help="what --generate begins with; None is the first character it knows")
    flag("--num_tokens", type=number(int, 0, 10**12), default=500, help="what --generate adds")
    flag("--temperature", type=number(float, 0), default=1.0, help="of sampling; 0 takes the likeliest")
    flag("--top_k", type=count, help="sample among the k likeliest only")
    flag("--sample_chars", type=number(int, 0, 10**12), default=500, help="characters to write at the end")
    flag("--tiny", action="store_true", help=f"preset for a laptop, other flags win: {TINY}")
    args = parser.parse_args(argv)
    file = args.resume or args.generate
    state = load_checkpoint(file) if file else None
    preset = state["flags"] if state else TINY if args.tiny else {}
    args = parser.parse_args([f"--{name}={value}" for name, value in preset.items()] + argv)
    if state:
        differ = [f"--{name} {vars(args)[name]} (saved: {preset.get(name)})" for name in SHAPE
                  if vars(args)[name] != preset.get(name)]
        if differ:
            fail(f"{file} has a model of another shape: {', '.join(differ)}")
        if args.resume and state["step"] > args.max_iters:
            fail(f"--max_iters {args.max_iters}: the run in {file} is at step {state['step']} already")
        args.save = args.save or args.resume
        args.tiny = True  # no need to recommend it
    args.stop, args.state = None, state  # the signal that ends the run, the saved run that it goes on with
    args.rank = int(os.environ.get("RANK", 0))  # torchrun sets these
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    if args.n_embd % args.n_head:
        fail(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}")
    if args.batch_size % (args.grad_accum * args.world):
        fail(f"--batch_size {args.batch_size} is not a multiple of --grad_accum {args.grad_accum}"
             + f" times {args.world} processes" * (args.world > 1))
    if args.pe != "randn" and (args.n_embd if args.pe_at == "input" else args.n_embd // args.n_head) % 2:
        fail(f"--pe {args.pe} works on pairs of channels: --n_embd {args.n_embd}"
             f"{f' / --n_head {args.n_head}' if args.pe_at == 'qk' else ''} has to be even")
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    try:
        args.device = torch.device(devices[0] if args.device == "auto" else args.device)
        if args.device.type == "cuda" and args.world > 1:
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)  # for nccl
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

class PositionalEncoding(nn.Module):
    """Tells x (..., T, dim) its positions 0 to T-1, by a table without trained parameters -> (..., T, dim).

    randn adds 0.02 N(0, 1), drawn once; sinpe adds sines and cosines (Vaswani et al. 2017); rope turns each
    pair of channels (2i, 2i+1) by the angle t 10000^(-2i/dim) (Su et al. 2021).
    """

    def __init__(self, pe, block_size, dim):
        super().__init__()
        self.pe = pe
        if pe == "randn":
            self.register_buffer("table", 0.02 * torch.randn(block_size, dim))
            return
        frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)  # (dim/2,)
        angle = torch.arange(block_size)[:, None] * frequency  # (block_size, dim/2)
        sin, cos = angle.sin(), angle.cos()
        if pe == "sinpe":
            self.register_buffer("table", torch.stack((sin, cos), dim=-1).flatten(-2), persistent=False)
        else:
            self.register_buffer("cos", torch.stack((cos, cos), dim=-1).flatten(-2), persistent=False)
            self.register_buffer("sin", torch.stack((-sin, sin), dim=-1).flatten(-2), persistent=False)

    def forward(self, x):
        T = x.shape[-2]
        if self.pe != "rope":
            return x + self.table[:T].type_as(x)
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # channels 1, 0, 3, 2, ...
        return (x * self.cos[:T] + swapped * self.sin[:T]).type_as(x)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, all heads in one batch: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = Dropout(config.dropout)
        self.dropout = config.dropout
        self.pe = nn.Identity()
        if config.pe_at == "qk":
            self.pe = PositionalEncoding(config.pe, config.block_size, config.n_embd // config.n_head)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = self.pe(q), self.pe(k)  # (B, nh, T, hs), like v
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0,
                                           is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two layers with GELU (tanh form) between, applied to each token by itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Communication, then computation: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
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
    """The language model; config has vocab_size, block_size, n_embd, n_head, n_layer, dropout, pe, pe_at."""

    experiment = "gpt_v3"

    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.pe = nn.Identity()
        if config.pe_at == "input":
            self.pe = PositionalEncoding(config.pe, config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size), and the mean cross-entropy in nats given targets."""
        x = self.pe(self.wte(idx))  # (B, T, C)
        x = self.blocks(x)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (1, T): yields max_new_tokens token ids, one at a time."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.block_size:])  # the positions the model knows
            logits = logits[:, -1] / max(temperature, 1e-6)  # (1, vocab_size), of what follows
            if top_k and top_k < logits.shape[-1]:
                logits[logits < logits.topk(top_k).values[:, -1:]] = float("-inf")
            token = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, token), dim=1)
            yield token.item()


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


# --- Checkpoints -----------------------------------------------------------------------------------------

FORMAT = "gpt_v3 1"


def check_save(config):
    """Refuse, before anything is computed, a --save that cannot be written or would replace another run."""
    if config.save != config.resume and any(map(os.path.lexists, (config.save, f"{config.save}.best"))):
        fail(f"--save {config.save}: it or its .best is there already; --resume goes on with a run")
    try:
        open(f"{config.save}.tmp", "wb").close()
        os.remove(f"{config.save}.tmp")
    except OSError as error:
        fail(f"--save {config.save}: {error.strerror}")


def save_checkpoint(state, paths):
    """Write state to paths, each by way of a temporary file: what has such a name is always whole.

    A disk that is full or gone costs one line, neither the run nor the files of before.
    """
    data = io.BytesIO()
    torch.save(state, data)
    for path in paths:
        try:
            with open(f"{path}.tmp", "wb") as file:
                file.write(data.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(f"{path}.tmp")
            return print(f"warning: --save {path}: {error.strerror}; the run goes on", file=sys.stderr)


def load_checkpoint(path):
    """What save_checkpoint wrote. Any other file ends the program, and nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as file, warnings.catch_warnings(action="ignore"):
            # torch.load does not notice a changed byte, and leaves unread what says that it is a folder.
            if file.testzip() or any(member.external_attr for member in file.infolist()):
                raise ValueError
            state = torch.load(path, map_location="cpu", weights_only=True)
            flags, chars, model = state["flags"], state["chars"], state["model"]
            if (state["format"] != FORMAT or set(flags) - set(KEPT) or chars != sorted(set("".join(chars)))
                    or model["wte.weight"].shape != (len(chars), flags["n_embd"])
                    or len(model) < flags["n_layer"]
                    or not all(isinstance(moments, dict) for moments in state["optimizer"].values())
                    or not 0 <= state["step"] or not 0 <= state["best_iter"]
                    or not 0 <= state["train_s"] < 1e12
                    or not 0 <= state["best_val"]):
                raise ValueError
        return state
    except OSError as error:
        fail(f"{path}: {error.strerror}; a file that --save wrote is wanted")
    except Exception:  # a damaged or hostile file can make torch.load raise anything
        fail(f"{path}: not a file that --save wrote, or damaged")


def restore(model, optimizer, batches, config):
    """Put config.state into a fresh run -> step, train_s, best_val, best_iter."""
    state, config.state = config.state, None  # its memory is free after this
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]})
        for p, moments in optimizer.state.items():
            for name, like in dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p).items():
                if (moments[name].shape, moments[name].dtype) != (like.shape, like.dtype):
                    raise ValueError
        if config.rank == 0:  # the other processes draw their dropout anew
            torch.set_rng_state(state["rng"])
            if config.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], config.device)
        batches.set_state(state["batches"])
        return int(state["step"]), float(state["train_s"]), float(state["best_val"]), int(state["best_iter"])
    except Exception:
        fail(f"--resume {config.resume}: damaged, or not of a {config.device.type} run")


def has_row(path, row):
    """Whether a CSV has this row already: the run was killed between its row and its end."""
    if not os.path.exists(path):
        return False
    text = io.StringIO()
    csv.writer(text, lineterminator=",").writerow(  # what follows is time and memory
        [row.get(name, "") for name in COLUMNS[:COLUMNS.index("compile_s")]])
    with open(path, "rb") as file:
        return b"\n" + text.getvalue().encode(errors="surrogateescape") in file.read()


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


def choose_sdpa(config):
    """SDPA may use flash, but not on a CPU in bfloat16 up to some 512 tokens: its unfused path wins there."""
    unfused = config.device.type == "cpu" and config.dtype == "bfloat16" and config.block_size <= 512
    torch.backends.cuda.enable_flash_sdp(not unfused)  # the switch is not CUDA's alone


def learning_rate(step, config):
    """Linear warm-up to config.learning_rate, then constant, or with min_lr a cosine down to that."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    if config.min_lr is None:
        return config.learning_rate
    done = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)  # 0 to 1
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def stop_requested(step, config):
    """The number of the signal that asked this run to end, else None; all processes agree on it."""
    if config.world == 1:
        return config.stop
    if step % 10:  # asking the others takes time
        return None
    stop = torch.tensor(config.stop or 0, device=config.device)
    torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
    return stop.item() or None


def end(stop, step, config):
    """End every process of the run with the status of the signal stop; the first one says how to go on."""
    kept = config.save and os.path.exists(config.save)
    if config.rank == 0:
        print(f"stopped at step {step}: {f'--resume {config.save} goes on' if kept else 'nothing was saved'}",
              file=sys.stderr, flush=True)
    if config.world > 1:
        torch.distributed.barrier()  # torchrun ends the others as soon as one has ended
    sys.exit(128 + stop)


def train(config):
    """Train a GPT as the flags say, report and append its losses -> the model, the list of characters."""
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    splits, chars = load_data(config)
    if config.state and config.state["chars"] != chars:
        fail(f"--data {config.data}: its characters are not those of {config.resume}")
    config.vocab_size = len(chars)
    model = GPT(config).to(config.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)
    choose_sdpa(config)
    batches = torch.Generator(config.device).manual_seed(config.seed)
    parts = config.grad_accum * config.world  # of a batch, for one pass of one process
    x, y = get_batch(splits["train"], config, batches)
    compile_s, iter_s = warm_up(model, x[::parts], y[::parts], config)
    start, train_s, best_val, best_iter = 0, 0.0, math.inf, 0
    if config.state:
        start, train_s, best_val, best_iter = restore(model, optimizer, batches, config)
    replica = model
    if config.world > 1:
        torch.distributed.init_process_group("nccl" if config.device.type == "cuda" else "gloo")
        if config.rank:  # other dropout than the first process
            torch.manual_seed(config.seed + config.rank + start)
        replica = nn.parallel.DistributedDataParallel(model)
        replica.broadcast_buffers = False  # they never change

    def save(*paths):
        if config.rank == 0:
            flags = {name: vars(config)[name] for name in KEPT if vars(config)[name] is not None}
            state = dict(format=FORMAT, flags=flags, chars=chars, step=step, model=model.state_dict(),
                         optimizer=optimizer.state_dict()["state"], train_s=train_s, best_val=best_val,
                         best_iter=best_iter, rng=torch.get_rng_state(), batches=batches.get_state())
            if config.device.type == "cuda":
                state["cuda_rng"] = torch.cuda.get_rng_state(config.device)
            save_checkpoint(state, paths)

    eval_s, recent = 0.0, torch.zeros(min(config.eval_interval, config.max_iters), device=config.device)
    started = drawn = time.perf_counter()
    for step in range(start, config.max_iters + 1):
        if stop := stop_requested(step, config):
            train_s += time.perf_counter() - started
            if config.save:
                save(config.save)
            end(stop, step, config)
        if step % config.eval_interval == 0 or step == config.max_iters:
            batch_losses = recent.tolist()  # waits for the device
            train_s += time.perf_counter() - started
            started = time.perf_counter()
            losses = estimate_loss(model, splits, config)
            eval_s = time.perf_counter() - started
            iter_s = train_s / step if step else iter_s
            report(step, losses, batch_losses, iter_s, eval_s, config)
            better = losses["val"] < best_val or step == best_iter  # resumed, it may lack its FILE.best
            if better:
                best_val, best_iter = losses["val"], step
            if config.save:
                save(config.save, *[f"{config.save}.best"] * better)
            started = time.perf_counter()
        if step == config.max_iters:
            break
        x, y = get_batch(splits["train"], config, batches)
        optimizer.zero_grad(set_to_none=True)
        for part in range(config.grad_accum):
            own = slice(config.rank * config.grad_accum + part, None, parts)
            replica.require_backward_grad_sync = part == config.grad_accum - 1  # of DDP: once an iteration
            with autocast(config):
                _, loss = replica(x[own], y[own])
            (loss / config.grad_accum).backward()
        recent[step % config.eval_interval] = loss.detach()  # unread until an evaluation: reading waits
        if config.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        if sys.stdout.isatty() and time.perf_counter() > drawn + 0.5:
            drawn = time.perf_counter()
            print(f"step {step}/{config.max_iters}, eta {time_left(step, iter_s, eval_s, config)} ", end="\r")

    print(f"final: train loss {losses['train']:.4f}, val loss {losses['val']:.4f} "
          f"(best {best_val:.4f} at step {best_iter})", flush=True)
    if config.csv and config.rank == 0:
        row = result_row(
            model, splits, config, train_loss=losses["train"], val_loss=losses["val"], best_val_loss=best_val,
            best_iter=best_iter, compile_s=compile_s, train_s=train_s, iter_s=iter_s)
        if not (config.resume and has_row(config.csv, row)):
            append_row(config.csv, row)
    del replica  # before its process group: in the other order their threads can wait for each other
    if config.world > 1:
        torch.distributed.destroy_process_group()
    return model, chars


# --- Sample ----------------------------------------------------------------------------------------------

@torch.compiler.set_stance("force_eager")  # every length is new: nothing to compile for
def sample(model, chars, config, prompt, num_tokens):
    """Write prompt and num_tokens characters more to standard output, each as soon as it is drawn."""
    prompt = prompt or chars[0]
    unknown = [char for char in prompt if char not in chars]
    if unknown:
        fail(f"--prompt: the model does not know {unknown[0]!r}, only {''.join(chars)!r}")
    start = torch.tensor([[chars.index(char) for char in prompt]], device=config.device)
    print(prompt, end="", flush=True)
    for token in model.eval().generate(start, num_tokens, config.temperature, config.top_k):
        print(chars[token], end="", flush=True)
    print()


def load_model(config):
    """The model of --generate and its characters."""
    chars = config.state["chars"]
    config.vocab_size = len(chars)
    torch.manual_seed(config.seed)
    model = GPT(config)
    try:
        model.load_state_dict(config.state["model"])
    except Exception:
        fail(f"--generate {config.generate}: not a file that --save wrote, or damaged")
    return model.to(config.device), chars


def main():
    config = parse_args()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number, frame):  # the loop sees it after its iteration; a second signal ends the program at once
        config.stop = number
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)

    if config.csv:
        append_row(config.csv)
    if config.save and config.rank == 0 and not config.generate:
        check_save(config)
    if config.rank:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    try:
        if config.generate:
            sample(*load_model(config), config, config.prompt, config.num_tokens)
            return
        try:
            for each in handlers:
                signal.signal(each, stop)
            model, chars = train(config)
        finally:  # a notebook goes on after this
            for each, handler in handlers.items():
                signal.signal(each, handler)
        if config.rank == 0:
            sample(model, chars, config, None, config.sample_chars)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(128 + 13)  # as a program that SIGPIPE ended
    except KeyboardInterrupt:  # while it writes
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        if out_of_memory(error):
            fail(f"out of memory: lower --batch_size {config.batch_size} or --block_size {config.block_size}")
        if config.generate:  # weights that are not numbers
            fail(f"--generate {config.generate}: {str(error).splitlines()[0]}")
        raise


if __name__ == "__main__":
    main()
