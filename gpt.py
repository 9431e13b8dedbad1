"""The GPT of the lecture "Let's build GPT" (github.com/karpathy/ng-video-lecture): a Transformer that reads
Shakespeare a character at a time and learns to write the next one, with its attention spelled out by hand.

    python gpt.py --tiny    # for a laptop; without --tiny it is a model for a GPU
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy"]
# ///
import argparse, csv, io, math, os, sys, time, zlib
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
        self.dropout = nn.Dropout(config.dropout)
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
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))

class FeedForward(nn.Module):
    """Two layers, applied to each token by itself: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        C, p = config.n_embd, config.dropout
        self.net = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(p))

    def forward(self, x):
        return self.net(x)

class Block(nn.Module):
    """Communication between tokens, then computation in each: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.sa = MultiHeadAttention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ffwd = FeedForward(config)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))

class GPT(nn.Module):
    """The language model; config has block_size, n_embd, n_head, n_layer and dropout."""
    experiment = "gpt"

    def __init__(self, config, vocab_size):
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding_table = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, vocab_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, vocab_size), and with targets the loss in nats a token."""
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
            logits, _ = self(idx[:, -self.block_size:])  # the model knows no more positions
            probs = F.softmax(logits[:, -1], dim=-1)  # (B, vocab_size), of what follows the last token
            idx = torch.cat((idx, torch.multinomial(probs, num_samples=1)), dim=1)
        return idx

# --- Data ------------------------------------------------------------------------------------------------
def load_data(config):
    """The text -> token ids to train on (N,) and to validate on (M,), its characters and its CRC-32."""
    try:
        with open(config.data, encoding="utf-8-sig") as file:  # a byte order mark is no character
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--data {config.data}: {error}; any text in UTF-8 will do, and tiny Shakespeare is at "
             "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
    chars = sorted(set(text))
    ids = {char: i for i, char in enumerate(chars)}
    tokens = torch.tensor([ids[char] for char in text], dtype=torch.long, device=config.device)
    n = int(0.9 * len(tokens))
    if len(tokens) - n <= config.block_size:
        fail(f"--data {config.data}: a tenth of it has to be longer than --block_size {config.block_size}")
    return tokens[:n], tokens[n:], chars, zlib.crc32(text.encode())

def get_batch(data, start, block_size):
    """The windows of data (N,) at start (B,) -> inputs (B, T), and targets (B, T), which are one token on."""
    window = data[start[:, None] + torch.arange(block_size + 1, device=data.device)]  # (B, T+1)
    return window[:, :-1], window[:, 1:]

# --- Evaluation ------------------------------------------------------------------------------------------
@torch.no_grad()
def estimate_loss(model, data, config):
    """The mean loss in nats over evenly spaced windows of data (N,): the same at every call."""
    model.eval()
    count, last = config.eval_iters * config.batch_size, len(data) - config.block_size - 1
    starts = torch.arange(count, device=data.device) * last // max(1, count - 1)  # from 0 to last
    losses = [model(*get_batch(data, at, config.block_size))[1] for at in starts.split(config.batch_size)]
    model.train()
    return round(torch.stack(losses).mean().item(), 6)

# --- Flags -----------------------------------------------------------------------------------------------
TINY = ("--batch_size 16 --block_size 96 --max_iters 2000 --eval_interval 500 --eval_iters 100 "
        "--learning_rate 1.5e-3 --n_embd 128 --n_head 4 --n_layer 2 --dropout 0")

def fail(message, status=2):
    """End the program with one line on standard error; status 2 asks for other flags or another file."""
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)

def parse_args(argv=None):
    """The flags in argv (a list of strings, by default the command line) as a Namespace, checked."""
    if argv is None:  # a notebook's kernel has flags of its own
        argv = [] if sys.argv[0].endswith("kernel_launcher.py") else sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: fail(f"{message}; --help lists the flags")
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    flag = parser.add_argument
    flag("--batch_size", type=int, default=64, help="sequences in an iteration")
    flag("--block_size", type=int, default=256, help="characters in a sequence, the longest context")
    flag("--max_iters", type=int, default=5000, help="training iterations")
    flag("--eval_interval", type=int, default=500, help="iterations from one evaluation to the next")
    flag("--eval_iters", type=int, default=200, help="batches of each split in an evaluation")
    flag("--learning_rate", type=float, default=3e-4, help="step size of AdamW")
    flag("--n_embd", type=int, default=384, help="channels of a token, a multiple of n_head")
    flag("--n_head", type=int, default=6, help="attention heads")
    flag("--n_layer", type=int, default=6, help="Transformer blocks")
    flag("--dropout", type=float, default=0.2, help="share of activations dropped in training")
    flag("--seed", type=int, default=1337, help="seed of weights, batches and dropout")
    flag("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto is bfloat16 if fast")
    flag("--data", default="input.txt", help="the text to learn from, in UTF-8")
    flag("--device", choices=devices, default=devices[0], help="where to compute")
    flag("--compile", action=argparse.BooleanOptionalAction, default="auto", help="auto compiles on cuda")
    flag("--csv", help="a file to append a row with the final losses to")
    flag("--sample_chars", type=int, default=500, help="characters to write at the end")
    flag("--tiny", action="store_true", help=f"for a laptop, and other flags win: {TINY}")
    args = parser.parse_args((TINY.split() if "--tiny" in argv else []) + argv)  # the last of a flag wins
    ranges = dict(learning_rate=(0, 10), dropout=(0, 0.99), seed=(0, 2**63 - 1), sample_chars=(0, 10**9))
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1, 10**9))
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"--{name} {value} is not from {low} to {high}")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}")
    if args.dtype == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if args.device == "cuda" else
                torch.cpu.get_capabilities().get("avx512_bf16", False))
        args.dtype = "bfloat16" if fast else "float32"
    args.compile = args.device == "cuda" if args.compile == "auto" else args.compile
    return args

# --- Training --------------------------------------------------------------------------------------------
def log(text, config, end="\n"):
    """Print text; a run with a --csv outlives a closed pipe or a full disk there, for the sake of its row."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not config.csv:
            sys.exit(1)  # nothing else is to come, and `| head` has seen enough

def compile_blocks(model, data, config):
    """Compile block by block, in place: one graph serves every layer, and the weights keep their names."""
    torch.compiler.reset()  # of earlier models in a notebook: Dynamo keeps no more than eight graphs
    torch.compiler.set_stance("default")
    for block in model.blocks:
        block.compile()
    try:
        model(*get_batch(data, data.new_zeros(config.batch_size), config.block_size))[1].backward()
        estimate_loss(model, data, config)  # has a graph of its own
    except Exception as error:  # no compiler, no Triton, an old GPU
        print(f"warning: going on without --compile: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.compiler.set_stance("force_eager")
    model.train().zero_grad(set_to_none=True)

def train(config):
    """Train a GPT as the flags say, report and append its losses -> the model, the list of characters."""
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    train_data, val_data, chars, crc32 = load_data(config)
    if config.csv:
        append_rows(config.csv)
    model = GPT(config, len(chars)).to(config.device)  # weights in float32, matrix products in config.dtype:
    model.forward = torch.autocast(config.device, torch.bfloat16, config.dtype == "bfloat16")(model.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    params = sum(p.numel() for p in model.parameters())
    how = "compiling" if config.compile else "eager" if config.tiny else "eager; --tiny is for a laptop"
    log(f"{model.experiment}: {params / 1e6:.2f}M parameters, {config.device}, {config.dtype}, {how}", config)
    if config.compile:
        compile_blocks(model, train_data, config)
    terminal, curve, eval_s = sys.stdout is not None and sys.stdout.isatty(), {}, 0.0
    started = shown = time.perf_counter()
    for step in range(config.max_iters + 1):
        evaluating = step % config.eval_interval == 0 or step == config.max_iters
        if evaluating or step == 10 or terminal and time.perf_counter() > shown + 0.5:
            if step:
                loss.item()  # waits for the device
            shown, line = time.perf_counter(), f"step {step}"
            train_s = shown - started
            if evaluating:
                curve[step] = [estimate_loss(model, data, config) for data in (train_data, val_data)]
                if not math.isfinite(sum(curve[step])):
                    fail(f"the loss is not finite at step {step}; a lower --learning_rate may help", 1)
                line += ": train loss {:.4f}, val loss {:.4f}".format(*curve[step])
                eval_s = time.perf_counter() - shown
                started += eval_s  # an evaluation takes no training time
            if step:
                left, rate = config.max_iters - step, step / train_s
                eta = round(left / rate + math.ceil(left / config.eval_interval) * eval_s)
                line += " | {:.2f} ms/iter, {:.2f}M tok/s, eta {}:{:02}".format(
                    1e3 / rate, rate * config.batch_size * config.block_size / 1e6, *divmod(eta, 60))
            log(line, config, end="\r" if terminal and not evaluating else "\n")
        if step == config.max_iters:
            break
        start = torch.randint(len(train_data) - config.block_size, (config.batch_size,), generator=generator,
                              device=config.device)
        _, loss = model(*get_batch(train_data, start, config.block_size))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    best = min(curve, key=lambda step: curve[step][1])
    log("final: train loss {:.4f}, val loss {:.4f} (best {:.4f} at step {})".format(
        *curve[step], curve[best][1], best), config)
    if config.csv:
        append_rows(config.csv, vars(config) | dict(
            experiment=model.experiment, pe_type="None", train_loss=curve[step][0], val_loss=curve[step][1],
            best_val_loss=curve[best][1], best_iter=best, params=params, train_s=round(train_s, 2),
            ms_per_iter=round(1e3 * train_s / step, 3), torch=torch.__version__, data_crc32=crc32,
            data=os.path.basename(config.data), flags=run_flags(config),
            curve=" ".join("{}:{:.4f}:{:.4f}".format(i, *curve[i]) for i in curve)))
    return model, chars

# --- Results ---------------------------------------------------------------------------------------------
COLUMNS = """experiment pe_type n_embd n_head n_layer train_loss val_loss best_val_loss best_iter
    published_train_loss published_val_loss params ms_per_iter train_s device torch data data_crc32 flags
    curve""".split()  # the same in all three scripts

def run_flags(config):
    """The flags that shape a run, as a command line that runs it again on the same text."""
    names = list(vars(config))
    return " ".join(f"--{name} {vars(config)[name]}" for name in names[:names.index("data")])

def append_rows(path, *rows):
    """Append dicts, or only the header, to a CSV of COLUMNS, locked and in one write: no line is torn."""
    header, text = ",".join(COLUMNS) + "\n", io.StringIO()
    csv.DictWriter(text, COLUMNS, "", "ignore", lineterminator="\n").writerows(rows)
    try:
        with open(path, "a+b", buffering=0) as file:
            if os.name == "posix":
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            data = (header * (size == 0) + text.getvalue()).encode()
            file.seek(0)
            if size and file.readline() != header.encode():
                raise ValueError("it has other columns")
            if file.write(data) < len(data):
                file.truncate(size)
                raise OSError("no space left on the disk")
    except (OSError, ValueError) as error:
        fail(f"--csv {path}: {error}" + f"; the row was {text.getvalue()}" * len(rows), 1 if rows else 2)

# --- Main ------------------------------------------------------------------------------------------------
def main():
    config = parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show becomes a question mark
    try:
        model, chars = train(config)
        with torch.compiler.set_stance("force_eager"):  # every length is new: nothing to compile for
            tokens = model.eval().generate(torch.tensor([[0]], device=config.device), config.sample_chars)[0]
        log("".join(chars[token] for token in tokens), config)
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C, before there was a row or a sample", 130)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate" not in str(error):
            raise
        fail(f"out of memory: lower --batch_size {config.batch_size} or --block_size {config.block_size}")

if __name__ == "__main__":
    main()
