"""Changes from gpt_v2.py: one projection (with bias) and one batch for all heads (CausalSelfAttention, as in
makemore), GELU for ReLU, positional encodings (--pe, --pe_at), no bias in lm_head, a learning rate schedule.
Other attention (--attn), a codebook for the MLP (--mlp), Muon (--optimizer), other data: each is a flag away.
A run can be saved, resumed, finetuned (--init_from), sampled (--generate) and spread over GPUs (torchrun).

    python gpt_v3.py --tiny --pe rope --pe_at qk    # for a laptop; without --tiny it is a model for a GPU
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy"]
# ///
import argparse, contextlib, csv, io, math, os, pickle, shlex, signal, sys, time, zlib
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

# --- Model -----------------------------------------------------------------------------------------------
class PositionalEncoding(nn.Module):
    """Tells x (..., T, dim) its positions -> (..., T, dim). randn adds 0.02 N(0, 1), drawn once; sinpe adds
    sines and cosines of t 10000^(-2i/dim) to the channels 2i and 2i+1 (Vaswani et al. 2017); rope turns this
    pair of channels by that angle (Su et al. 2021)."""
    def __init__(self, config, dim):
        super().__init__()
        self.pe = config.pe
        angle = torch.arange(config.block_size)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        sin, cos = angle.sin(), angle.cos()  # (block_size, dim/2)
        pairs = lambda a, b: torch.stack((a, b), dim=-1).flatten(-2)
        if self.pe == "rope":
            self.register_buffer("cos", pairs(cos, cos), persistent=False)
            self.register_buffer("sin", pairs(-sin, sin), persistent=False)
        else:
            table = pairs(sin, cos) if self.pe == "sinpe" else 0.02 * torch.randn(config.block_size, dim)
            self.register_buffer("table", table, persistent=self.pe == "randn")

    def forward(self, x, start=0):
        at = slice(start, start + x.shape[-2])
        if self.pe != "rope":
            return x + self.table[at].type_as(x)
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # channels 1, 0, 3, 2, ...
        return (x * self.cos[at] + swapped * self.sin[at]).type_as(x)

def remember(cache, start, *new):
    """The new keys and values (B, ..., T, dim), with a cache behind those of the positions before start."""
    if cache is not None:
        new = cache[:] = [torch.cat(pair, dim=-2) for pair in zip(cache, new)] if start else list(new)
    return new

class CausalSelfAttention(nn.Module):
    """Causal self-attention, all heads in one batch: (B, T, C) -> (B, T, C). Keys and values have as many
    heads as queries (mha), one (mqa, Shazeer 2019), or n_kv_head of them (gqa, Ainslie et al. 2023)."""
    def __init__(self, config):
        super().__init__()
        n_kv_head = {"mha": config.n_head, "mqa": 1}.get(config.attn, config.n_kv_head)
        self.heads, self.dropout = [config.n_head, n_kv_head, n_kv_head], config.dropout
        self.head_size = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * self.head_size)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.pe = config.pe_at == "qk" and PositionalEncoding(config, self.head_size)

    def forward(self, x, start=0, cache=None):
        q, k, v = self.c_attn(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2).split(self.heads, dim=1)
        if self.pe:
            q, k = self.pe(q, start), self.pe(k, start)  # (B, nh, T, hs), like v, or fewer heads in k and v
        k, v = remember(cache, start, k, v)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training,
                                           is_causal=x.shape[1] > 1, enable_gqa=self.heads[1] < self.heads[0])
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # heads side by side

class LatentAttention(nn.Module):
    """Multi-head latent attention (mla, DeepSeek-V2, arXiv 2405.04434): (B, T, C) -> (B, T, C). Keys and
    values of all heads come from a latent of kv_rank channels, and this is what is cached. At qk the encoding
    has its own channels, half as many as a head: in each query, and in one decoupled key for all heads."""
    def __init__(self, config):
        super().__init__()
        C, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        self.head_size = C // config.n_head
        self.pe_size = self.head_size // 2 if config.pe_at == "qk" else 0
        self.c_q = nn.Linear(C, C + config.n_head * self.pe_size, bias=False)
        self.c_latent = nn.Linear(C, config.kv_rank + self.pe_size, bias=False)
        self.ln_latent = nn.LayerNorm(config.kv_rank)  # an RMSNorm there; nor are queries compressed here
        self.c_kv = nn.Linear(config.kv_rank, 2 * C, bias=False)
        self.c_proj = nn.Linear(C, C)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.pe = self.pe_size and PositionalEncoding(config, self.pe_size)

    def forward(self, x, start=0, cache=None):
        q = self.c_q(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, nh, T, hs + pe_size)
        q, q_pe = q.split([self.head_size, self.pe_size], dim=-1)
        latent, k_pe = self.c_latent(x).split([self.c_kv.in_features, self.pe_size], dim=-1)
        if self.pe:
            q_pe, k_pe = self.pe(q_pe, start), self.pe(k_pe, start)
        latent, k_pe = remember(cache, start, self.ln_latent(latent), k_pe)  # (B, T, kv_rank or pe_size)
        how = dict(dropout_p=self.dropout * self.training, scale=(self.head_size + self.pe_size) ** -0.5)
        if x.shape[1] == 1:  # c_kv meets the one query and what it finds, not all the latents
            to_k, to_v = self.c_kv.weight.unflatten(0, (2, self.n_head, -1))  # (nh, hs, kv_rank)
            q = torch.cat((q @ to_k, q_pe), dim=-1).squeeze(2)  # (B, nh, kv_rank + pe_size): heads as tokens
            k = torch.cat((latent, k_pe), dim=-1)  # (B, T, kv_rank + pe_size)
            y = F.scaled_dot_product_attention(q, k, latent, **how).unsqueeze(2) @ to_v.mT  # (B, nh, 1, hs)
        else:
            k, v = self.c_kv(latent).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
            k = torch.cat((k, k_pe.unsqueeze(1).expand(-1, self.n_head, -1, -1)), dim=-1)
            q, v = torch.cat((q, q_pe), dim=-1), F.pad(v, (0, self.pe_size))  # fused kernels want one width
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, **how)
        return self.resid_dropout(self.c_proj(y[..., :self.head_size].transpose(1, 2).flatten(2)))

class MLP(nn.Module):
    """Two layers with GELU (tanh form) between, applied to each token by itself: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))

class VQ(nn.Module):
    """Attention of each token to a learned codebook E in the MLP's place: (B, T, C) -> (B, T, C). In each
    head it is softmax(x E^T / sqrt(hs)) E; a codebook has no time, so nothing is masked."""
    def __init__(self, config):
        super().__init__()
        size = config.n_head, config.codebook, config.n_embd // config.n_head
        self.codebook = nn.Parameter(torch.randn(size))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        q = x.unflatten(-1, (len(self.codebook), -1)).transpose(1, 2)  # (B, nh, T, hs)
        codes = self.codebook.expand(len(x), -1, -1, -1)  # (B, nh, codebook, hs)
        return self.dropout(F.scaled_dot_product_attention(q, codes, codes).transpose(1, 2).flatten(2))

class Block(nn.Module):
    """Communication between tokens, then computation in each: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = (LatentAttention if config.attn == "mla" else CausalSelfAttention)(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = (VQ if config.mlp == "vq" else MLP)(config)

    def forward(self, x, start=0, cache=None):
        x = x + self.attn(self.ln_1(x), start, cache)
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    """The language model; config has the flags n_embd to codebook, block_size, device and dtype."""
    experiment = "gpt_v3"

    def __init__(self, config, vocab_size):
        super().__init__()
        torch.backends.cuda.enable_cudnn_sdp(False)  # on a GPU, the same kernel for training and evaluation
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # without a kernel, still in bfloat16
        torch.backends.cuda.enable_flash_sdp(  # it is slow there for short sequences
            (config.device, config.dtype) != ("cpu", "bfloat16") or config.block_size > 512)
        self.block_size = config.block_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.pe = config.pe_at == "input" and PositionalEncoding(config, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, start=0, cache=None):
        """Token ids (B, T) -> logits (B, T, vocab_size), and with targets the loss in nats a token.
        idx begins at position start; cache, a list for each block, holds what it needs of earlier tokens."""
        x = self.wte(idx)  # (B, T, C)
        x = self.pe(x, start) if self.pe else x
        for i, block in enumerate(self.blocks):
            x = block(x, start, cache and cache[i])
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T): yields max_new_tokens times the next tokens (B, 1)."""
        start, cache = 0, [[] for _ in self.blocks]
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.block_size:  # no position is left: begin anew, from the last half
                idx, start = idx[:, -max(1, self.block_size // 2):], 0
            logits, _ = self(idx[:, start:], start=start, cache=cache)
            logits, start = logits[:, -1] / max(temperature, 1e-6), idx.shape[1]  # (B, vocab_size)
            if top_k and top_k < logits.shape[-1]:
                logits[logits < logits.topk(top_k).values[:, -1:]] = float("-inf")
            token = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, token), dim=1)
            yield token

# --- Data ------------------------------------------------------------------------------------------------
def load_data(config, chars=None):
    """The data -> token ids to train on (N,) and to validate on (M,), the string of each id, a CRC-32.
    A text's tokens are its characters, all of them in chars if a model to go on with has these."""
    if os.path.isdir(config.data):
        return load_folder(config, chars)
    try:
        with open(config.data, encoding="utf-8-sig") as file:  # a byte order mark is no character
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--data {config.data}: {error}; any text in UTF-8 will do, and tiny Shakespeare is at "
             "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
    unknown = sorted(set(text) - set(chars or text))
    if unknown:
        fail(f"--data {config.data}: the model does not know {' '.join(map(repr, unknown[:9]))}")
    chars = chars or sorted(set(text))
    ids = {char: i for i, char in enumerate(chars)}
    tokens = torch.tensor([ids[char] for char in text], dtype=torch.long, device=config.device)
    n = int(0.9 * len(tokens))
    if len(tokens) - n <= config.block_size:
        fail(f"--data {config.data}: a tenth of it has to be longer than --block_size {config.block_size}")
    return tokens[:n], tokens[n:], chars, zlib.crc32(text.encode())

class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of plain types; one that asks for a class or a function is refused."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

def load_folder(config, chars=None):
    """load_data for a folder of nanoGPT: train.bin and val.bin have token ids in uint16 and stay on the disk;
    meta.pkl has the character of each id, without it the ids are GPT-2's 50,257, padded to 50,304."""
    name, splits, crc32, largest = "meta.pkl", [], 0, 0
    try:
        strings = [f"{i} " for i in range(50304)]
        if os.path.exists(os.path.join(config.data, name)):
            with open(os.path.join(config.data, name), "rb") as file:
                itos = PlainUnpickler(file).load()["itos"]
            strings = [str(itos[i]) for i in range(len(itos))]
        if strings != (chars or strings):
            raise ValueError("the model has another vocabulary")
        for name in ("train.bin", "val.bin"):
            with open(os.path.join(config.data, name), "rb") as file:
                while chunk := file.read(2**24):  # 16 MiB
                    crc32, largest = zlib.crc32(chunk, crc32), max(largest, np.frombuffer(chunk, "<u2").max())
            splits.append(np.memmap(os.path.join(config.data, name), "<u2", "r"))
            if largest >= len(strings):
                raise ValueError(f"there is a token {largest}, the vocabulary ends at {len(strings) - 1}")
            if len(splits[-1]) <= config.block_size:
                raise ValueError(f"it has to be longer than --block_size {config.block_size}")
    except Exception as error:  # of any type, from a damaged meta.pkl
        fail(f"--data {config.data}: {name}: {error or type(error).__name__}")
    return *splits, strings, crc32

def get_batch(data, start, block_size):
    """The windows of data (N,) at start (B,) -> inputs (B, T), and targets (B, T), which are one token on."""
    at = start[:, None] + torch.arange(block_size + 1, device=start.device)  # (B, T+1)
    if isinstance(data, np.memmap):  # mapped anew each time, or every page ever read would stay in memory
        data = np.memmap(data.filename, data.dtype, "r")
        window = torch.from_numpy(data[at.cpu().numpy()].astype(np.int64)).to(start.device)
    else:
        window = data[at]
    return window[:, :-1], window[:, 1:]

# --- Evaluation ------------------------------------------------------------------------------------------
@torch.no_grad()
def estimate_loss(model, data, config, attention_dropout=False):
    """The mean loss in nats over evenly spaced windows of data (N,): the same at every call. In the published
    runs of gpt_v2 and gpt_v3, the dropout inside SDPA was left on; attention_dropout does that."""
    model.eval()
    for block in model.blocks:
        block.attn.training = attention_dropout
    count, last = config.eval_iters * config.batch_size, len(data) - config.block_size - 1
    starts = torch.arange(count, device=config.device) * last // max(1, count - 1)  # from 0 to last
    parts = starts.split(config.batch_size // config.grad_accum // ranks()[1])  # as large as in training
    losses = [model(*get_batch(data, part, config.block_size))[1] for part in parts]
    model.train()
    return round(torch.stack(losses).mean().item(), 6)

# --- Flags -----------------------------------------------------------------------------------------------
TINY = ("--batch_size 8 --block_size 192 --max_iters 1500 --eval_interval 750 --eval_iters 75 "
        "--learning_rate 5e-3 --n_embd 128 --n_head 4 --n_layer 2 --dropout 0 --optimizer muon "
        "--warmup_iters 100 --min_lr 5e-5 --weight_decay 0.5 --beta2 0.99")

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
    flag("--learning_rate", type=float, default=3e-4, help="step size of the optimizer")
    flag("--n_embd", type=int, default=384, help="channels of a token, a multiple of n_head")
    flag("--n_head", type=int, default=6, help="attention heads")
    flag("--n_layer", type=int, default=6, help="Transformer blocks")
    flag("--dropout", type=float, default=0.2, help="share of activations dropped in training")
    flag("--pe", choices=["randn", "sinpe", "rope"], default="sinpe", help="positional encoding")
    flag("--pe_at", choices=["input", "qk"], default="input", help="at the embedding, or at q and k")
    flag("--attn", choices=["mha", "mqa", "gqa", "mla"], default="mha", help="kind of attention")
    flag("--n_kv_head", type=int, help="heads of keys and values with gqa; without it, half of n_head")
    flag("--kv_rank", type=int, help="channels of the latent with mla; without it, half of n_embd")
    flag("--mlp", choices=["gelu", "vq"], default="gelu", help="vq attends to a learned codebook instead")
    flag("--codebook", type=int, help="vectors in the codebook of each head with vq; without it, 512")
    flag("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon is for the blocks' matrices")
    flag("--warmup_iters", type=int, default=0, help="iterations in which the learning rate rises from 0")
    flag("--min_lr", type=float, help="learning rate that a cosine ends at; without it, it is constant")
    flag("--weight_decay", type=float, default=0.01, help="weight decay, with muon of its matrices")
    flag("--beta2", type=float, default=0.999, help="decay of AdamW's mean of squared gradients")
    flag("--grad_clip", type=float, default=0.0, help="largest norm of the gradient; 0 sets no limit")
    flag("--grad_accum", type=int, default=1, help="parts in which a batch is computed, to save memory")
    flag("--seed", type=int, default=1337, help="seed of weights, batches and dropout")
    flag("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto is bfloat16 if fast")
    flag("--init_from", help="a file of --save whose model to finetune, on other --data")
    flag("--data", default="input.txt", help="a text in UTF-8, or a folder with train.bin and val.bin")
    flag("--device", choices=devices, default=devices[0], help="where to compute")
    flag("--compile", action=argparse.BooleanOptionalAction, default="auto", help="auto compiles on cuda")
    flag("--csv", help="a file to append a row with the final losses to")
    flag("--save", help="a file to keep the run in, at every evaluation; its best state is kept in FILE.best")
    flag("--resume", help="a file of --save whose run goes on, and is kept there")
    flag("--generate", help="a file of --save whose model writes text")
    flag("--prompt", help="how the text of --generate begins; without it, with the model's first character")
    flag("--temperature", type=float, default=1.0, help="of sampling; 0 takes the likeliest character")
    flag("--top_k", type=int, help="sample from the k likeliest characters only")
    flag("--sample_chars", "--num_tokens", type=int, default=500, help="characters to write at the end")
    flag("--num_samples", type=int, default=1, help="texts to write at the end, at once")
    flag("--tiny", action="store_true", help=f"for a laptop, and other flags win: {TINY}")
    args = parser.parse_args(argv)
    file, *others = list(filter(None, (args.resume, args.generate, args.init_from))) or [None]
    if others:
        parser.error("--resume, --generate and --init_from exclude each other")
    shape = "block_size n_embd n_head n_layer pe pe_at attn n_kv_head kv_rank mlp codebook".split()
    preset = load_run(file)["flags"] if file else TINY.split() * args.tiny
    if args.init_from:
        pairs = zip(preset[::2], preset[1::2])
        preset = TINY.split() * args.tiny + [word for pair in pairs if pair[0][2:] in shape for word in pair]
    args, saved = parser.parse_args(preset + argv), parser.parse_args(preset)  # the last of a flag wins
    for name in (shape + ["optimizer"] * bool(args.resume)) * bool(file):
        if vars(args)[name] != vars(saved)[name]:
            parser.error(f"--{name} {vars(args)[name]}: the run in {file} has {vars(saved)[name]}")
    for kind, of, name, default in (("gqa", args.attn, "n_kv_head", max(1, args.n_head // 2)),
                                    ("mla", args.attn, "kv_rank", max(1, args.n_embd // 2)),
                                    ("vq", args.mlp, "codebook", 512)):
        if of != kind and vars(args)[name] is not None:
            parser.error(f"--{name} {vars(args)[name]} is for {kind} only")
        if of == kind and vars(args)[name] is None:
            vars(args)[name] = default
    zero = "warmup_iters min_lr weight_decay grad_clip temperature sample_chars".split()
    ranges = dict.fromkeys(zero, (0, 10**9)) | dict(
        learning_rate=(0, 10), dropout=(0, 0.99), beta2=(0, 0.99999), seed=(0, 2**63 - 1))
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1, 10**9))
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"--{name} {value} is not from {low} to {high}")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}")
    if args.n_head % (args.n_kv_head or 1):
        parser.error(f"--n_head {args.n_head} is not a multiple of --n_kv_head {args.n_kv_head}")
    of = 1 if args.pe_at == "input" else 2 * args.n_head if args.attn == "mla" else args.n_head
    if args.n_embd < of or args.pe != "randn" and args.n_embd // of % 2:
        parser.error(f"--pe {args.pe} --pe_at {args.pe_at} needs an even number of channels: --n_embd / {of}")
    if args.batch_size % (args.grad_accum * ranks()[1]):
        parser.error(f"--batch_size has to be a multiple of --grad_accum times {ranks()[1]} processes")
    args.save = args.save or args.resume
    if args.save != args.resume and os.path.lexists(args.save):
        parser.error(f"--save {args.save}: it is there already; --resume goes on with it")
    if args.save and not os.access(os.path.dirname(args.save) or ".", os.W_OK):
        parser.error(f"--save {args.save}: its folder is not there or cannot be written to")
    if args.dtype == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if args.device == "cuda" else
                torch.cpu.get_capabilities().get("avx512_bf16", False))
        args.dtype = "bfloat16" if fast else "float32"
    args.compile = args.device == "cuda" if args.compile == "auto" else args.compile
    return args

# --- Training --------------------------------------------------------------------------------------------
def log(text, config, end="\n"):
    """Print text; a run with --csv or --save outlives a closed pipe or a full disk there, for their sake."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not (config.csv or config.save):
            sys.exit(1)  # nothing else is to come, and `| head` has seen enough

def compile_blocks(model, data, config):
    """Compile block by block, in place: one graph serves every layer, and the weights keep their names."""
    torch.compiler.reset()  # of earlier models in a notebook: Dynamo keeps no more than eight graphs
    torch.compiler.set_stance("default")
    for block in model.blocks:
        block.compile()
    start = torch.arange(config.batch_size // config.grad_accum // ranks()[1], device=config.device)
    try:
        model(*get_batch(data, start, config.block_size))[1].backward()
        estimate_loss(model, data, config)  # has a graph of its own
    except Exception as error:  # no compiler, no Triton, an old GPU
        print(f"warning: going on without --compile: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.compiler.set_stance("force_eager")
    model.train().zero_grad(set_to_none=True)

def ranks():
    """The rank of this process and the number of processes, as torchrun sets them: without it, 0 and 1."""
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)

def learning_rate(step, config):
    """Linear warm-up to config.learning_rate, then constant, or with min_lr a cosine down to that."""
    low = config.learning_rate if config.min_lr is None else config.min_lr
    done = max(0, step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)  # from 0 to 1
    warm = min(1, (step + 1) / max(1, config.warmup_iters))
    return warm * (low + (config.learning_rate - low) * (1 + math.cos(math.pi * done)) / 2)

def make_optimizers(model, config):
    """AdamW, or AdamW without decay beside Muon (Jordan et al. 2024), which is for the blocks' matrices."""
    rate, decay = config.learning_rate, config.weight_decay
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and config.optimizer == "muon"]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = [torch.optim.Muon(matrices, rate, decay, adjust_lr_fn="match_rms_adamw")] if matrices else []
    adamw = torch.optim.AdamW(rest, rate, (0.9, config.beta2), weight_decay=decay * (not muon), fused=True)
    return [adamw, *muon]

def train(config):
    """Train a GPT as the flags say, report and append its losses -> the model, the list of characters."""
    rank, world = ranks()
    if world > 1:
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if config.device == "cuda" else "gloo")
    torch.manual_seed(config.seed + rank)  # for other dropout in each process; all get the first's weights
    torch.set_float32_matmul_precision("high")
    file = config.resume or config.init_from
    state = load_run(file) if file else {"chars": None}
    train_data, val_data, chars, crc32 = load_data(config, state["chars"])
    if config.csv:
        append_rows(config.csv)
    model = GPT(config, len(chars)).to(config.device)  # weights in float32, matrix products in config.dtype:
    model.forward = torch.autocast(config.device, torch.bfloat16, config.dtype == "bfloat16")(model.forward)
    optimizers = make_optimizers(model, config)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    params = sum(p.numel() for p in model.parameters())
    how = "compiling" if config.compile else "eager" if config.tiny else "eager; --tiny is for a laptop"
    log(f"{model.experiment}: {params / 1e6:.2f}M parameters, {config.device}, {config.dtype}, {how}", config)
    if config.compile:
        compile_blocks(model, train_data, config)
    first, train_s, curve, eval_s = 0, 0.0, {}, 0.0  # curve is {step: (train loss, val loss)}
    random = torch.cuda if config.device == "cuda" else torch  # has the state of what dropout draws
    if file:
        with reading(file):
            model.load_state_dict(state["model"])
    if config.resume:
        first, train_s, curve = state["step"], state["train_s"], state["curve"]
        if state["crc32"] != crc32:
            fail(f"--data {config.data} is not what the run in {file} learns from; --init_from finetunes")
        if first > config.max_iters:
            fail(f"--max_iters {config.max_iters}: the run in {config.resume} is at step {first} already")
        with reading(file):
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            generator.set_state(state["generator"])
            random.set_rng_state(state["rng"])
    replica = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    stops = []  # the signals that ask the loop to end after its iteration; a second one ends it at once
    stop = lambda number, frame: stops.append(number) or signal.signal(number, signal.SIG_DFL)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    started = (shown := time.perf_counter()) - train_s
    with contextlib.ExitStack() as undo:
        for number in (signal.SIGINT, signal.SIGTERM):  # the first process decides for all
            undo.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN if rank else stop))
        for step in range(first, config.max_iters + 1):
            evaluating = step % config.eval_interval == 0 or step == config.max_iters
            if stops or evaluating or step == first + 10 or terminal and time.perf_counter() > shown + 0.5:
                if step > first:
                    loss.item()  # waits for the device
                shown, line = time.perf_counter(), f"step {step}"
                train_s = shown - started
                if evaluating:
                    curve[step] = [estimate_loss(model, data, config) for data in (train_data, val_data)]
                    if not math.isfinite(sum(curve[step])):
                        fail(f"the loss is not finite at step {step}; a lower --learning_rate may help", 1)
                    line += ": train loss {:.4f}, val loss {:.4f}".format(*curve[step])
                best = min(curve, key=lambda step: curve[step][1])
                if config.save and rank == 0 and (evaluating or stops):
                    flags = f"{run_flags(config)} --data {shlex.quote(config.data)}"
                    save_run([config.save] + [f"{config.save}.best"] * (step == best), dict(
                        flags=flags, chars=chars, crc32=crc32, step=step, train_s=train_s, curve=curve,
                        model=model.state_dict(), optimizers=[each.state_dict() for each in optimizers],
                        generator=generator.get_state(), rng=random.get_rng_state()))
                if stops:
                    fail(f"stopped at step {step}" + f"; --resume {config.save} goes on" * bool(config.save),
                         128 + stops[0])
                if evaluating:
                    started += (eval_s := time.perf_counter() - shown)  # which takes no training time
                if step:
                    left, rate = config.max_iters - step, step / train_s
                    eta = round(left / rate + math.ceil(left / config.eval_interval) * eval_s)
                    line += " | {:.2f} ms/iter, {:.2f}M tok/s, eta {}:{:02}".format(
                        1e3 / rate, rate * config.batch_size * config.block_size / 1e6, *divmod(eta, 60))
                log(line, config, end="\r" if terminal and not evaluating else "\n")
            if step == config.max_iters:
                break
            start = torch.randint(len(train_data) - config.block_size, (config.batch_size,),
                                  generator=generator, device=config.device)
            model.zero_grad(set_to_none=True)
            for part in range(config.grad_accum):
                own = start[rank * config.grad_accum + part::config.grad_accum * world]
                replica.require_backward_grad_sync = part == config.grad_accum - 1  # DDP: once
                _, loss = replica(*get_batch(train_data, own, config.block_size))
                (loss / config.grad_accum).backward()
            if config.grad_clip:
                nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            for optimizer, times in zip(optimizers, (len(optimizers), 1)):  # AdamW, twice as fast beside Muon
                optimizer.param_groups[0]["lr"] = times * learning_rate(step, config)
                optimizer.step()
    log("final: train loss {:.4f}, val loss {:.4f} (best {:.4f} at step {})".format(
        *curve[step], curve[best][1], best), config)
    if config.compile:
        torch.compiler.set_stance("force_eager")  # what follows is too short or too varied to compile for
    if config.csv and rank == 0:
        published = [estimate_loss(model, data, config, True) for data in (train_data, val_data)]
        append_rows(config.csv, vars(config) | dict(
            experiment=model.experiment, pe_type=config.pe, train_loss=curve[step][0],
            val_loss=curve[step][1], best_val_loss=curve[best][1], best_iter=best, params=params,
            published_train_loss=published[0], published_val_loss=published[1], train_s=round(train_s, 2),
            ms_per_iter=round(1e3 * train_s / step, 3), torch=torch.__version__, data_crc32=crc32,
            data=os.path.basename(os.path.abspath(config.data)), flags=run_flags(config),
            curve=" ".join("{}:{:.4f}:{:.4f}".format(i, *curve[i]) for i in curve)))
    del replica  # before its process group: in the other order their threads can wait for each other
    if world > 1:
        torch.distributed.destroy_process_group()
    return model, chars

# --- Saved runs ------------------------------------------------------------------------------------------
@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong with a saved run ends the program with one line."""
    try:
        yield
    except Exception as error:
        why = getattr(error, "strerror", None) or "not a file that --save wrote on such a device, or damaged"
        fail(f"{path}: {why}")

def load_run(path):
    """What save_run wrote to path, on the CPU; nothing in it is executed."""
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = "chars crc32 step train_s curve model optimizers generator rng".split()
        return {name: state[name] for name in names} | {"flags": shlex.split(str(state["flags"]))}

def save_run(paths, state):
    """Write state to each of paths, by way of a temporary file: what has the name is always whole."""
    data = io.BytesIO()
    torch.save(state, data)
    for path in paths:
        try:
            with open(f"{path}.tmp", "wb") as file:
                file.write(data.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        except OSError as error:  # a disk that is full or gone
            print(f"warning: --save {path}: {error.strerror}; the run goes on", file=sys.stderr)

# --- Results ---------------------------------------------------------------------------------------------
COLUMNS = """experiment pe_type n_embd n_head n_layer train_loss val_loss best_val_loss best_iter
    published_train_loss published_val_loss params ms_per_iter train_s device torch data data_crc32 flags
    curve""".split()  # the same in all three scripts

def run_flags(config):
    """The flags that shape a run, as a command line that runs it again on the same text."""
    names = list(vars(config))
    return " ".join(f"--{name} {shlex.quote(str(vars(config)[name]))}" for name in names[:names.index("data")]
                    if vars(config)[name] is not None)

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

# --- Sample and main -------------------------------------------------------------------------------------
def sample(model, chars, config):
    """Write the prompt, or the first token, and what the model draws then, one text as it is drawn."""
    torch.manual_seed(config.seed)
    prompt = config.prompt or chars[0]
    words = [f"{word} " for word in prompt.split()] if chars[0] == "0 " else prompt  # ids, without meta.pkl
    for char in set(words) - set(chars):
        fail(f"--prompt: the model does not know {char!r}")
    idx = torch.tensor([[chars.index(char) for char in words]] * config.num_samples, device=config.device)
    drawn = model.eval().generate(idx, config.sample_chars, config.temperature, config.top_k)
    if config.num_samples == 1:
        log("".join(words), config, end="")
        for token in drawn:
            log(chars[token.item()], config, end="")
        log("", config)
    else:
        for row in torch.cat([idx, *drawn], dim=1).tolist():
            log("".join(chars[token] for token in row) + "\n" + "-" * 20, config)

def main():
    config = parse_args()
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show becomes a question mark
    try:
        if config.generate:
            state = load_run(config.generate)
            model, chars = GPT(config, len(state["chars"])).to(config.device), state["chars"]
            with reading(config.generate):
                model.load_state_dict(state["model"])
        else:
            model, chars = train(config)
        sample(model, chars, config)
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C, before there was a row or a sample", 130)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate" not in str(error):
            raise
        fail(f"out of memory: lower --batch_size {config.batch_size} or --block_size {config.block_size}")

if __name__ == "__main__":
    main()
