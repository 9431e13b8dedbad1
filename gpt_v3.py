"""Changes from gpt_v2.py: one projection (with bias) and one batch for all heads (CausalSelfAttention, as in
makemore), GELU instead of ReLU, positional encodings (--pe, --pe_at), and no bias in lm_head. Other kinds of
attention (--attn), a codebook instead of the MLP (--mlp), Muon (--optimizer), a learning rate schedule and
other data are one flag each. A run can be saved, resumed, finetuned, sampled and spread over GPUs.

    python gpt_v3.py --tiny --pe rope --pe_at qk --attn gqa    # for a laptop; without --tiny, it is one for a GPU
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "numpy"]
# ///
import argparse, contextlib, csv, io, math, os, pickle, shlex, shutil, signal, sys, time, zlib
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

# --- Model -----------------------------------------------------------------------------------------------
class PositionalEncoding(nn.Module):
    """Encodes the positions of x (..., T, dim), which begins at position start -> (..., T, dim).
    randn adds 0.02 N(0, 1), drawn once and never trained; sinpe adds the sine and cosine of t 10000^(-2i/dim)
    to channels 2i and 2i+1 (Vaswani et al. 2017); rope rotates this pair by that angle (Su et al. 2021)."""
    def __init__(self, config, dim):
        super().__init__()
        self.pe = config.pe
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)  # (dim/2,)
        angles = torch.arange(config.block_size)[:, None] * frequencies  # (block_size, dim/2)
        sin = angles.sin()
        cos = angles.cos()
        if self.pe == "randn":
            self.register_buffer("table", 0.02 * torch.randn(config.block_size, dim))
        elif self.pe == "sinpe":
            self.register_buffer("table", interleave(sin, cos), persistent=False)
        else:
            self.register_buffer("cos", interleave(cos, cos), persistent=False)
            self.register_buffer("sin", interleave(-sin, sin), persistent=False)

    def forward(self, x, start=0):
        end = start + x.shape[-2]
        if self.pe != "rope":
            return x + self.table[start:end].type_as(x)
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # channels 1, 0, 3, 2, ...
        return (x * self.cos[start:end] + swapped * self.sin[start:end]).type_as(x)

def interleave(a, b):
    """a (T, dim/2) in the even channels and b (T, dim/2) in the odd ones -> (T, dim)."""
    return torch.stack((a, b), dim=-1).flatten(-2)

class Cache:
    """What attention has to remember of the tokens so far: model(idx, cache=cache) continues them."""
    def __init__(self):
        self.length = 0  # tokens so far
        self.tensors = {}  # of each attention layer: keys and values, or latents, as (..., length, dim)

    def update(self, layer, *new):
        """Append the tensors of new tokens to those of layer -> all of them."""
        if layer in self.tensors:
            new = [torch.cat(pair, dim=-2) for pair in zip(self.tensors[layer], new)]
        self.tensors[layer] = new
        return new

def attend(q, k, v, dropout):
    """Causal attention of q (B, nh, T, hs) to k and v (B, nh or fewer, S, hs) -> (B, nh, T, hs).
    The T queries are the last of the S tokens: with a cache, S is larger than T."""
    T = q.shape[2]
    S = k.shape[2]
    mask = None
    if 1 < T < S:  # SDPA's is_causal would take the queries for the first tokens
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=T == S,
                                          enable_gqa=k.shape[1] < q.shape[1])

class CausalSelfAttention(nn.Module):
    """Causal self-attention, all heads in one batch: (B, T, C) -> (B, T, C). Keys and values have as many
    heads as queries (mha), one (mqa, Shazeer 2019), or n_kv_head (gqa, Ainslie et al. 2023)."""
    def __init__(self, config):
        super().__init__()
        n_kv_head = config.n_head
        if config.attn == "mqa":
            n_kv_head = 1
        elif config.attn == "gqa":
            n_kv_head = config.n_kv_head or max(1, config.n_head // 2)
        self.heads = [config.n_head, n_kv_head, n_kv_head]  # of q, k and v
        self.head_size = config.n_embd // config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * self.head_size)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.pe = PositionalEncoding(config, self.head_size) if config.pe_at == "qk" else None

    def forward(self, x, start=0, cache=None):
        qkv = self.c_attn(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, all heads, T, hs)
        q, k, v = qkv.split(self.heads, dim=1)
        if self.pe:
            q = self.pe(q, start)
            k = self.pe(k, start)
        if cache:
            k, v = cache.update(self, k, v)
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

class LatentAttention(nn.Module):
    """Multi-head latent attention (mla, DeepSeek-V2, arXiv 2405.04434): (B, T, C) -> (B, T, C). Keys and
    values of all heads come from a latent of kv_rank channels per token, and only this is cached. At qk,
    positions have channels of their own, half a head: in each query, and in one key that all heads share.
    Unlike DeepSeek-V2, it normalizes latents by a LayerNorm and does not compress queries."""
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.head_size = C // config.n_head
        self.kv_rank = config.kv_rank or max(1, C // 2)
        self.pe_size = self.head_size // 2 if config.pe_at == "qk" else 0
        self.dropout = config.dropout
        self.c_q = nn.Linear(C, C + config.n_head * self.pe_size, bias=False)
        self.c_latent = nn.Linear(C, self.kv_rank + self.pe_size, bias=False)
        self.ln_latent = nn.LayerNorm(self.kv_rank)
        self.c_kv = nn.Linear(self.kv_rank, 2 * C, bias=False)
        self.c_proj = nn.Linear(C, C)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.pe = PositionalEncoding(config, self.pe_size) if config.pe_at == "qk" else None

    def forward(self, x, start=0, cache=None):
        q = self.c_q(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, nh, T, hs + pe_size)
        q, q_pe = q.split([self.head_size, self.pe_size], dim=-1)
        latent, k_pe = self.c_latent(x).split([self.kv_rank, self.pe_size], dim=-1)
        latent = self.ln_latent(latent)  # (B, T, kv_rank)
        if self.pe:
            q_pe = self.pe(q_pe, start)
            k_pe = self.pe(k_pe, start)  # (B, T, pe_size)
        if cache:
            latent, k_pe = cache.update(self, latent, k_pe)
        if cache and x.shape[1] == 1:
            y = self.attend_to_latents(q, q_pe, latent, k_pe)
        else:
            y = self.attend_to_heads(q, q_pe, latent, k_pe)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def attend_to_heads(self, q, q_pe, latent, k_pe):
        """Expand the latents to the keys and values of every head -> (B, nh, T, hs)."""
        k, v = self.c_kv(latent).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, nh, S, hs)
        k_pe = k_pe.unsqueeze(1).expand(-1, self.n_head, -1, -1)
        k = torch.cat((k, k_pe), dim=-1)
        q = torch.cat((q, q_pe), dim=-1)
        v = F.pad(v, (0, self.pe_size))  # fused kernels want one width
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        return y[..., :self.head_size]

    def attend_to_latents(self, q, q_pe, latent, k_pe):
        """The same for one new token, without keys and values: c_kv is applied to its query and to the
        latent it finds, not to all the latents -> (B, nh, 1, hs)."""
        to_k, to_v = self.c_kv.weight.unflatten(0, (2, self.n_head, -1))  # (nh, hs, kv_rank)
        q = torch.cat((q @ to_k, q_pe), dim=-1).squeeze(2)  # (B, nh, kv_rank + pe_size): heads as tokens
        k = torch.cat((latent, k_pe), dim=-1)  # (B, S, kv_rank + pe_size)
        scale = (self.head_size + self.pe_size) ** -0.5
        y = F.scaled_dot_product_attention(q, k, latent, scale=scale)  # (B, nh, kv_rank)
        return y.unsqueeze(2) @ to_v.mT

class MLP(nn.Module):
    """Two linear layers with a GELU (tanh form) in between, applied to each token: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(x))

class VQ(nn.Module):
    """Attention of each token to a learned codebook E, instead of the MLP: (B, T, C) -> (B, T, C). A head
    computes softmax(x E^T / sqrt(hs)) E; nothing is masked, since a codebook has no time."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.codebook = nn.Parameter(torch.randn(self.n_head, config.codebook, config.n_embd // self.n_head))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        q = x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, nh, T, hs)
        codes = self.codebook.expand(len(x), -1, -1, -1)  # (B, nh, codebook, hs)
        y = F.scaled_dot_product_attention(q, codes, codes)  # (B, nh, T, hs)
        return self.dropout(y.transpose(1, 2).flatten(2))

class Block(nn.Module):
    """Communication between the tokens, then computation on each: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = LatentAttention(config) if config.attn == "mla" else CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = VQ(config) if config.mlp == "vq" else MLP(config)

    def forward(self, x, start=0, cache=None):
        x = x + self.attn(self.ln_1(x), start, cache)
        x = x + self.mlp(self.ln_2(x))
        return x

class GPT(nn.Module):
    """The language model; config has the flags of the group model, device and dtype."""
    experiment = "gpt_v3"

    def __init__(self, config, vocab_size):
        super().__init__()
        torch.backends.cuda.enable_cudnn_sdp(False)  # training and evaluation use the same kernel on a GPU
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # without a fused kernel, keep bfloat16
        slow_flash = config.device == "cpu" and config.dtype == "bfloat16" and config.block_size <= 512
        torch.backends.cuda.enable_flash_sdp(not slow_flash)
        self.block_size = config.block_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.pe = PositionalEncoding(config, config.n_embd) if config.pe_at == "input" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None):
        """Token ids (B, T) -> logits (B, T, vocab_size) and, given targets, the loss in nats per token.
        With a Cache, idx continues earlier calls. More than block_size tokens in all are a ValueError."""
        start = cache.length if cache else 0
        end = start + idx.shape[1]
        if end > self.block_size:
            raise ValueError(f"{end} tokens are more than the block_size of {self.block_size}")
        x = self.wte(idx)  # (B, T, C)
        if self.pe:
            x = self.pe(x, start)
        for block in self.blocks:
            x = block(x, start, cache)
        if cache:
            cache.length = end
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T): yields the next tokens (B, 1), max_new_tokens times.
        Past block_size tokens, it starts over from the last half of them."""
        cache = Cache()
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.block_size:
                idx = idx[:, -max(1, self.block_size // 2):]
                cache = Cache()
            logits, _ = self(idx[:, cache.length:], cache=cache)
            logits = logits[:, -1] / max(temperature, 1e-6)  # (B, vocab_size), after the last token
            if top_k and top_k < logits.shape[-1]:
                smallest = logits.topk(top_k).values[:, -1:]
                logits[logits < smallest] = float("-inf")
            idx_next = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)
            yield idx_next

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T), all at once -> (B, T + max_new_tokens)."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], dim=1)

# --- Data ------------------------------------------------------------------------------------------------
def load_data(config, chars=None):
    """The data as token ids to train on (N,) and to validate on (M,), the text of each id, and a CRC-32.
    The tokens of a text are its characters; a model that is continued brings its own, chars."""
    if os.path.isdir(config.data):
        return load_folder(config, chars)
    try:
        with open(config.data, encoding="utf-8-sig") as file:  # a byte order mark is not part of the text
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--data {config.data}: {error}; any text in UTF-8 will do, and tiny Shakespeare is at "
             "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
    if chars is None:
        chars = sorted(set(text))
    unknown = sorted(set(text) - set(chars))
    if unknown:
        fail(f"--data {config.data}: the model does not know {' '.join(map(repr, unknown[:9]))}")
    ids = {char: i for i, char in enumerate(chars)}
    tokens = torch.tensor([ids[char] for char in text], device=config.device)
    n = int(0.9 * len(tokens))
    if len(tokens) - n <= config.block_size:
        fail(f"--data {config.data}: a tenth of it must be longer than --block_size {config.block_size}")
    return tokens[:n], tokens[n:], chars, zlib.crc32(text.encode())

GPT2_IDS = [f"{i} " for i in range(50304)]  # for GPT-2's 50,257 tokens, padded as in nanoGPT

class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of plain types, and refuses one that asks for a class or a function."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

def load_folder(config, chars=None):
    """load_data for a folder of nanoGPT: train.bin and val.bin hold token ids in uint16 and stay on the disk;
    meta.pkl holds the character of each id, and without it the ids are GPT-2's."""
    vocabulary = GPT2_IDS
    meta = os.path.join(config.data, "meta.pkl")
    if os.path.exists(meta):
        with describing(f"--data {meta}"):
            with open(meta, "rb") as file:
                itos = PlainUnpickler(file).load()
            if not isinstance(itos, dict) or not isinstance(itos.get("itos"), dict):
                raise ValueError("it has no itos, a dict with the character of each id")
            vocabulary = [str(itos["itos"][i]) for i in range(len(itos["itos"]))]
    if chars not in (None, vocabulary):
        fail(f"--data {config.data}: the model has a different vocabulary")
    splits = []
    crc32 = 0
    for name in ("train.bin", "val.bin"):
        path = os.path.join(config.data, name)
        with describing(f"--data {path}"):
            crc32 = check_ids(path, len(vocabulary), crc32)
            split = np.memmap(path, "<u2", "r")
            if len(split) <= config.block_size:
                raise ValueError(f"must be longer than --block_size {config.block_size}")
            splits.append(split)
    return *splits, vocabulary, crc32

def check_ids(path, vocab_size, crc32):
    """Check that a file holds ids below vocab_size in uint16 -> its CRC-32, continuing that of another."""
    if os.path.getsize(path) % 2:
        raise ValueError("its size is odd: these are not token ids in uint16")
    pairs = np.fromfile(path, "<u4", 10000)
    if pairs.any() and pairs.max() < 2**16:
        raise ValueError("every second id is 0: these look like token ids in uint32, not in uint16")
    with open(path, "rb") as file:
        while chunk := file.read(2**24):  # 16 MiB
            crc32 = zlib.crc32(chunk, crc32)
            largest = np.frombuffer(chunk, "<u2").max()
            if largest >= vocab_size:
                raise ValueError(f"holds the id {largest}, but the vocabulary ends at {vocab_size - 1}")
    return crc32

@contextlib.contextmanager
def describing(name):
    """End the program with one line about the file of this name if it cannot be used."""
    try:
        yield
    except Exception as error:  # of any type: a damaged pickle raises whatever it likes
        fail(f"{name}: {str(error) or type(error).__name__}")

def get_batch(data, start, block_size):
    """Windows of data (N,) that begin at start (B,) -> inputs (B, T), and targets (B, T) one token later."""
    index = start[:, None] + torch.arange(block_size + 1, device=start.device)  # (B, T+1)
    if torch.is_tensor(data):
        window = data[index]
    else:
        file = np.memmap(data.filename, data.dtype, "r")  # reopened, or all pages ever read stay in memory
        window = torch.from_numpy(file[index.numpy()].astype(np.int64))
    return window[:, :-1], window[:, 1:]

def device_of(data):
    """Where batches of data are drawn: a file is read by the CPU."""
    return data.device if torch.is_tensor(data) else torch.device("cpu")

# --- Loss and evaluation ---------------------------------------------------------------------------------
def compute_loss(model, data, start, config):
    """The mean loss on the windows of data (N,) that begin at start (B,), in nats per token."""
    x, y = get_batch(data, start, config.block_size)
    x = x.to(config.device, non_blocking=True)
    y = y.to(config.device, non_blocking=True)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        _, loss = model(x, y)
    return loss

@torch.no_grad()
def estimate_loss(model, data, config, stops=(), attention_dropout=False):
    """The mean loss on evenly spaced windows of data (N,), in nats per token: the same at every call.
    It is cut short once stops is not empty: the run is about to end.
    The published runs of gpt_v2 and gpt_v3 left dropout on in SDPA; attention_dropout does so, too."""
    model.eval()
    for block in model.blocks:
        block.attn.training = attention_dropout
    count = config.eval_iters * config.batch_size
    last = len(data) - config.block_size - 1
    starts = torch.arange(count, device=device_of(data)) * last // max(1, count - 1)  # from 0 to last
    losses = []
    for start in starts.split(micro_batch_size(config)):
        losses.append(compute_loss(model, data, start, config))
        if stops:
            break
    model.train()
    return round(torch.stack(losses).mean().item(), 6)

# --- Flags -----------------------------------------------------------------------------------------------
TINY = dict(batch_size=8, block_size=192, max_iters=1500, eval_interval=750, eval_iters=75,
            learning_rate=5e-3, n_embd=128, n_head=4, n_layer=2, dropout=0.0, optimizer="muon",
            warmup_iters=100, min_lr=5e-5, weight_decay=0.5, beta2=0.99)

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

def choice(group, name, choices, help):
    """Add a flag whose default is the first of its choices."""
    group.add_argument(name, choices=choices, default=choices[0], help=f"{help} (default: {choices[0]})")

def model_flags():
    """The flags of the model, which a saved run keeps."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("model")
    size = between(0, 10**9)
    flag(group, "--block_size", 256, "context length in tokens")
    flag(group, "--n_embd", 384, "channels per token, a multiple of n_head")
    flag(group, "--n_head", 6, "attention heads")
    flag(group, "--n_layer", 6, "Transformer blocks")
    choice(group, "--pe", ["sinpe", "randn", "rope"], "positional encoding")
    choice(group, "--pe_at", ["input", "qk"], "where it is applied: the embedding, or q and k of every head")
    choice(group, "--attn", ["mha", "mqa", "gqa", "mla"], "kind of attention")
    flag(group, "--n_kv_head", 0, "gqa: heads of keys and values; 0 is half of n_head", size)
    flag(group, "--kv_rank", 0, "mla: channels of the latent; 0 is half of n_embd", size)
    choice(group, "--mlp", ["gelu", "vq"], "MLP with GELU, or attention to a learned codebook")
    flag(group, "--codebook", 512, "vq: vectors per head")
    return parser

def shaping_flags():
    """The flags that shape a run; its row in --csv holds them."""
    parser = argparse.ArgumentParser(add_help=False, parents=[model_flags()])
    group = parser.add_argument_group("training")
    rate = between(0, 10, float)
    number = between(0, 10**9, float)
    flag(group, "--dropout", 0.2, "dropout probability", between(0, 0.99, float))
    flag(group, "--batch_size", 64, "sequences per iteration")
    flag(group, "--max_iters", 5000, "training iterations")
    flag(group, "--eval_interval", 500, "iterations between evaluations")
    flag(group, "--eval_iters", 200, "batches of each split per evaluation")
    choice(group, "--optimizer", ["adamw", "muon"], "muon: for the blocks' matrices, and AdamW for the rest")
    flag(group, "--learning_rate", 3e-4, "learning rate; alongside Muon, AdamW uses twice as much", rate)
    flag(group, "--warmup_iters", 0, "iterations in which the learning rate rises from 0", between(0, 10**9))
    group.add_argument("--min_lr", type=rate, help="final rate of a cosine decay (default: constant)")
    flag(group, "--weight_decay", 0.01, "weight decay; with muon, only of the matrices", number)
    flag(group, "--beta2", 0.999, "decay rate of AdamW's second moment", between(0, 0.99999, float))
    flag(group, "--grad_clip", 0.0, "largest gradient norm; 0 does not clip", number)
    flag(group, "--grad_accum", 1, "micro-batches per batch, to save memory")
    flag(group, "--seed", 1337, "random seed of weights, batches and dropout", between(0, 2**63 - 1))
    choice(group, "--dtype", ["auto", "bfloat16", "float32"], "precision; auto: bfloat16 where it is fast")
    group.add_argument("--init_from", help="saved run whose model is finetuned, with a fresh optimizer")
    return parser

def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, parents=[shaping_flags()],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [accelerator.type, "cpu"] if accelerator else ["cpu"]
    run = parser.add_argument_group("run")
    flag(run, "--data", "input.txt", "text in UTF-8, or a folder with train.bin and val.bin", str)
    choice(run, "--device", devices, "where to compute")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction,
                     help="compile the blocks (default: only on cuda)")
    run.add_argument("--csv", help="file to append a row with the final losses to")
    run.add_argument("--once", action="store_true", help="do nothing if --csv has a row of this run")
    run.add_argument("--save", help="file to save the run in at each evaluation; its best is FILE.best")
    run.add_argument("--resume", help="saved run to continue: with the same flags, --max_iters included, "
                     "bit for bit as if it had not stopped")
    run.add_argument("--tiny", action="store_true", help="laptop preset; other flags override it")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--generate", help="saved run to sample from, without training")
    sampling.add_argument("--prompt", help="beginning of the sample (default: the first token)")
    flag(sampling, "--max_new_tokens", 500, "length of the sample in tokens", between(0, 10**9))
    flag(sampling, "--num_samples", 1, "samples")
    flag(sampling, "--temperature", 1.0, "0 takes the likeliest token", between(0, 10**9, float))
    sampling.add_argument("--top_k", type=between(1, 10**9), help="the likeliest tokens (default: all)")
    return parser

def parse_args(argv=None):
    """The flags in argv, a list of strings (default: the command line), as a Namespace."""
    if argv is None:
        argv = [] if in_notebook() else sys.argv[1:]
    parser = make_parser()
    args = parser.parse_args(argv)
    files = [file for file in (args.resume, args.generate, args.init_from) if file]
    if len(files) > 1:
        parser.error("--resume, --generate and --init_from are mutually exclusive")
    if args.tiny:
        parser.set_defaults(**TINY)
    if files:
        saved = load_run(files[0])["flags"]
        fixed = [*vars(model_flags().parse_args([]))]
        if args.init_from:
            saved = {name: saved[name] for name in fixed}
        if args.resume:
            fixed.append("optimizer")
        parser.set_defaults(**saved)
    args = parser.parse_args(argv)  # once more, with those defaults
    if files:
        for name in fixed:
            if getattr(args, name) != saved[name]:
                parser.error(f"--{name} {getattr(args, name)}: the run in {files[0]} has {saved[name]}")
    check_model(parser, args)
    check_files(parser, args)
    if args.batch_size % (args.grad_accum * ranks()[1]):
        parser.error(f"--batch_size {args.batch_size} must be a multiple of --grad_accum {args.grad_accum} "
                     f"times the number of processes, {ranks()[1]}")
    if args.dtype == "auto":
        fast = torch.cpu.get_capabilities().get("avx512_bf16")
        if args.device == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if fast else "float32"
    if args.device == "mps" and args.dtype == "bfloat16" and torch.__version__ < "2.13":
        parser.error("--dtype bfloat16 on mps needs torch 2.13: earlier ones let attention see later tokens")
    if args.compile is None:
        args.compile = args.device == "cuda"
    return args

def check_model(parser, args):
    """Refuse flags of the model that do not go together."""
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}")
    n_kv_head = args.n_kv_head or max(1, args.n_head // 2)
    if args.attn == "gqa" and args.n_head % n_kv_head:
        parser.error(f"--n_head {args.n_head} is not a multiple of --n_kv_head {n_kv_head}")
    if args.n_kv_head and args.attn != "gqa":
        parser.error(f"--n_kv_head {args.n_kv_head} is only for --attn gqa")
    if args.kv_rank and args.attn != "mla":
        parser.error(f"--kv_rank {args.kv_rank} is only for --attn mla")
    if args.codebook != 512 and args.mlp != "vq":
        parser.error(f"--codebook {args.codebook} is only for --mlp vq")
    channels = args.n_embd
    if args.pe_at == "qk":
        channels = args.n_embd // args.n_head
        if args.attn == "mla":
            channels = channels // 2  # which only encode positions
    if channels == 0 or args.pe != "randn" and channels % 2:
        parser.error(f"--pe {args.pe} --pe_at {args.pe_at} needs an even number of channels, but --n_embd "
                     f"{args.n_embd} and --n_head {args.n_head} leave it {channels}")

def check_files(parser, args):
    """Refuse to save a run where it cannot be saved."""
    args.save = args.save or args.resume
    if args.save and args.save != args.resume and os.path.lexists(args.save):
        parser.error(f"--save {args.save}: already exists; --resume {args.save} continues it")
    if args.save and not os.access(os.path.dirname(os.path.abspath(args.save)), os.W_OK):
        parser.error(f"--save {args.save}: its folder does not exist or cannot be written to")

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

def write(text, config):
    """Print text as it is. With --csv or --save, a run continues when nobody can read it."""
    try:
        print(text, end="", flush=True)
    except OSError:  # a closed pipe, as after `| head`, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not config.csv and not config.save:
            sys.exit(1)

def log(text, config, end="\n"):
    """Print text in place of the progress line."""
    write(f"{erase()}{text}{end}", config)

def catch_signals(stops):
    """A context in which Ctrl-C, SIGTERM and SIGHUP are only appended to stops, a list."""
    def stop(number, frame):
        stops.append(number)
        if ranks()[1] == 1:  # torchrun passes on what its processes have already received
            signal.signal(number, signal.default_int_handler)  # a second one ends the run at once

    undo = contextlib.ExitStack()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            undo.callback(signal.signal, number, signal.signal(number, stop))
    return undo

def ranks():
    """The rank of this process and the number of processes, as torchrun sets them; otherwise 0 and 1."""
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in variables):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def micro_batch_size(config):
    """Sequences that a process computes at once."""
    return config.batch_size // config.grad_accum // ranks()[1]

def compile_blocks(model, data, config):
    """Compile each block in place: all layers share the code, and the weights keep their names."""
    if not config.compile:
        return
    start = torch.zeros(micro_batch_size(config), dtype=torch.long, device=device_of(data))
    try:
        torch.compiler.reset()  # forget the models that a notebook compiled before
        torch.compiler.set_stance("default")
        for block in model.blocks:
            block.compile()
        compute_loss(model, data, start, config).backward()
        with torch.no_grad():  # evaluation is compiled separately
            compute_loss(model.eval(), data, start, config)
        if config.device == "cuda" and config.grad_accum == 1 and ranks()[1] == 1:
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

def get_lr(step, config):
    """The learning rate of an iteration."""
    # 1. it rises linearly during warmup
    if step < config.warmup_iters:
        return (step + 1) / config.warmup_iters * config.learning_rate
    # 2. then it is constant
    if config.min_lr is None:
        return config.learning_rate
    # 3. or follows a cosine down to min_lr
    done = (step - config.warmup_iters) / (config.max_iters - config.warmup_iters)  # from 0 to 1
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * done)) / 2

def orthogonalize(x, dtype):
    """The matrix x with all its singular values moved close to 1, by Newton-Schulz iteration in dtype."""
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T, dtype).T
    x = x.to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T  # (rows, rows)
        gram = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)  # an odd polynomial of each singular value
    return x

class Muon(torch.optim.Optimizer):
    """SGD with momentum that orthogonalizes the update of each matrix (Jordan et al. 2024). PyTorch's Muon
    always computes in bfloat16, which is far too slow on a CPU without instructions for it."""

    def __init__(self, matrices, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            update = orthogonalize(p.grad.lerp(average, group["momentum"]), self.dtype)  # Nesterov's momentum
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)  # about as large as AdamW's

def make_optimizers(model, config):
    """AdamW; or Muon for the matrices of the blocks, and AdamW for the rest."""
    betas = (0.9, config.beta2)
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), config.learning_rate, betas,
                                  weight_decay=config.weight_decay, fused=True)]
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p not in chosen]
    adamw = torch.optim.AdamW(rest, config.learning_rate, betas, weight_decay=0.0, fused=True)
    adamw.param_groups[0]["lr_scale"] = 2  # embeddings, norms, biases and lm_head learn well at twice Muon's
    muon = Muon(matrices, config.learning_rate, config.weight_decay, getattr(torch, config.dtype))
    return [adamw, muon]

def training_step(step, replica, optimizers, data, generator, config):
    """Draw a batch from data (N,), of which this process has its share, and update the model once."""
    rank, world = ranks()
    start = torch.randint(len(data) - config.block_size, (config.batch_size,), generator=generator,
                          device=generator.device)
    replica.zero_grad(set_to_none=True)
    for part in range(config.grad_accum):
        replica.require_backward_grad_sync = part == config.grad_accum - 1  # DDP adds up gradients once
        mine = start.view(-1, world, config.grad_accum)[:, rank, part]  # (B / world / grad_accum,)
        loss = compute_loss(replica, data, mine, config)
        (loss / config.grad_accum).backward()
    if config.grad_clip:
        nn.utils.clip_grad_norm_(replica.parameters(), config.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, config) * group.get("lr_scale", 1)
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
    if config.device == "cpu" and not config.compile and not config.tiny and not config.resume:
        log("--tiny is a preset for a laptop", config)

def count_parameters(model):
    return sum(p.numel() for p in model.parameters())

def train(config, stops=None):
    """Train a GPT as the flags say, and report its losses -> model, chars (the text of each token).
    Ctrl-C, SIGTERM or SIGHUP ends the training early, and is appended to stops, a list."""
    stops = [] if stops is None else stops
    rank, world = join_processes(config)
    torch.manual_seed(config.seed + rank)  # for dropout; DDP copies the weights of rank 0
    torch.set_float32_matmul_precision("high")
    path = config.resume or config.init_from
    saved = load_run(path) if path else None
    train_data, val_data, chars, crc32 = load_data(config, saved["chars"] if saved else None)
    check_csv(config, crc32)
    model = GPT(config, len(chars)).to(config.device)
    optimizers = make_optimizers(model, config)
    generator = torch.Generator(device_of(train_data)).manual_seed(config.seed)
    announce(model, config)
    compile_blocks(model, train_data, config)
    run = dict(step=0, train_s=0.0, curve={}, chars=chars, crc32=crc32)  # curve: {step: (train, val loss)}
    if saved:
        restore_model(model, saved, path)
    if config.resume:
        restore(run, saved, optimizers, generator, config)
    replica = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    first = run["step"]
    eval_s = 0.0  # seconds of the last evaluation
    clock = Clock(config)
    with catch_signals(stops if rank == 0 else []):  # the first process decides for all
        for step in range(first, config.max_iters + 1):
            run["step"] = step
            if stops:
                break
            if step % config.eval_interval == 0 or step == config.max_iters:
                run["train_s"] += clock.lap()
                train_loss = estimate_loss(model, train_data, config, stops)
                val_loss = estimate_loss(model, val_data, config, stops)
                eval_s = clock.lap()
                if stops:
                    break
                if not math.isfinite(train_loss + val_loss):
                    fail(f"the loss is not finite at step {step}; a lower --learning_rate may help", 1)
                run["curve"][step] = (train_loss, val_loss)
                save_run(run, model, optimizers, generator, config)
                log(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                    f"{speed(step, run['train_s'], eval_s, config)}", config)
                clock.lap()  # the time spent saving does not count
            elif step == first + 10 or (step % 10 == 0 and on_terminal()):
                run["train_s"] += clock.lap()
                progress(f"step {step}{speed(step, run['train_s'], eval_s, config)}", config)
            if step < config.max_iters:
                training_step(step, replica, optimizers, train_data, generator, config)
    vars(model).pop("forward", None)  # drop the CUDA graphs, which only accept training batches
    if stops:
        run["train_s"] += clock.lap()
        save_run(run, model, optimizers, generator, config)
        hint = f"; --resume {config.save} continues it" if config.save else ""
        warn(f"stopped at step {step}{hint}")
        return model.eval(), chars
    if rank == 0:
        report(model, train_data, val_data, run, config)
    if world > 1:
        del replica  # before its process group, or their threads may wait for each other
        torch.distributed.destroy_process_group()
    return model.eval(), chars

def join_processes(config):
    """Join the processes that torchrun started, if any; on cuda, each has a GPU of its own.
    -> the rank of this process, and the number of processes."""
    rank, world = ranks()
    if world > 1:
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if config.device == "cuda" else "gloo")
    return rank, world

# --- Saved runs ------------------------------------------------------------------------------------------
def random_state(config):
    """The module that holds the state of the random numbers that dropout draws."""
    return {"cuda": torch.cuda, "mps": torch.mps}.get(config.device, torch)

def save_run(run, model, optimizers, generator, config):
    """Write a run to --save, and to FILE.best if its val loss is the lowest so far; a process that is killed
    meanwhile leaves the old file."""
    if not config.save or ranks()[0] > 0:
        return
    curve = run["curve"]
    paths = [config.save]
    if run["step"] == min(curve, key=lambda step: curve[step][1], default=None):
        paths.append(f"{config.save}.best")
    flags = {name: getattr(config, name) for name in vars(shaping_flags().parse_args([]))}
    data = io.BytesIO()
    torch.save(run | dict(
        flags=flags | dict(data=config.data),
        model=model.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        generator=generator.get_state(),
        rng=random_state(config).get_rng_state(),
    ), data)
    for path in paths:
        try:
            with open(f"{path}.tmp", "wb") as file:
                file.write(data.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        except OSError as error:  # a disk that is full or gone
            warn(f"warning: --save {path}: {error.strerror}; the run continues")

def load_run(path):
    """Read what save_run wrote, into memory; nothing in it is executed."""
    try:
        with open(path, "rb") as file:
            data = io.BytesIO(file.read())
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    try:
        state = torch.load(data, map_location="cpu", weights_only=True)
    except Exception:  # of many types
        fail(f"{path}: not a file that --save wrote, or damaged")
    names = "step train_s curve chars crc32 flags model optimizers generator rng".split()
    if not isinstance(state, dict) or any(name not in state for name in names):
        fail(f"{path}: not a file that --save wrote")
    known = {*vars(shaping_flags().parse_args([])), "data"}
    if not isinstance(state["flags"], dict) or known != set(state["flags"]):
        fail(f"{path}: saved by a version with different flags")
    return state

def restore_model(model, saved, path):
    """Load the weights of a saved run into model."""
    try:
        model.load_state_dict(saved["model"])
    except Exception as error:
        fail(f"{path}: its weights do not fit its flags: {str(error).splitlines()[-1][:200]}")

def restore(run, saved, optimizers, generator, config):
    """Continue a saved run where it was, with its optimizers and its random numbers."""
    if saved["crc32"] != run["crc32"]:
        fail(f"--data {config.data} is not the text of {config.resume}; --init_from finetunes on it")
    if saved["step"] > config.max_iters:
        fail(f"--max_iters {config.max_iters}: the run in {config.resume} is already at step {saved['step']}")
    try:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        random_state(config).set_rng_state(saved["rng"])
    except Exception as error:  # of any type
        fail(f"{config.resume}: its optimizer or random state does not fit --device {config.device}: {error}")
    for name in ("step", "train_s", "curve"):
        run[name] = saved[name]
    schedule = ["learning_rate", "warmup_iters", "min_lr"]
    if config.min_lr is not None:
        schedule.append("max_iters")  # where the cosine ends
    for name in schedule:
        if getattr(config, name) != saved["flags"][name]:
            log(f"the learning rate now follows --{name} {getattr(config, name)}, not {saved['flags'][name]}",
                config)

def load(path, config=None):
    """Read the model of a saved run, ready to sample from -> model, chars (the text of each token)."""
    config = config or parse_args(["--generate", path])
    saved = load_run(path)
    model = GPT(config, len(saved["chars"])).to(config.device)
    restore_model(model, saved, path)
    return model.eval(), saved["chars"]

# --- Results ---------------------------------------------------------------------------------------------
COLUMNS = """experiment pe_type n_embd n_head n_layer train_loss val_loss best_val_loss best_iter
    published_train_loss published_val_loss params ms_per_iter train_s device torch data data_crc32 flags
    curve""".split()  # the same in all three scripts

def run_flags(config):
    """The flags that shape a run, as a command line: with --data, it repeats the run."""
    values = {name: getattr(config, name) for name in vars(shaping_flags().parse_args([]))}
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in values.items()
                    if value is not None)

def report(model, train_data, val_data, run, config):
    """Print the final losses, and append the row of the run to --csv."""
    curve = run["curve"]
    train_loss, val_loss = curve[config.max_iters]
    best_iter = min(curve, key=lambda step: curve[step][1])
    best_val_loss = curve[best_iter][1]
    log(f"final: train loss {train_loss:.4f}, val loss {val_loss:.4f} "
        f"(best {best_val_loss:.4f} at step {best_iter})", config)
    if config.csv:
        if config.compile:
            torch.compiler.set_stance("force_eager")  # not worth compiling for once
        published_train_loss = estimate_loss(model, train_data, config, attention_dropout=True)
        published_val_loss = estimate_loss(model, val_data, config, attention_dropout=True)
        points = [f"{step}:{train:.4f}:{val:.4f}" for step, (train, val) in curve.items()]
        append_row(config.csv, vars(config) | dict(
            experiment=model.experiment,
            pe_type=config.pe,
            train_loss=train_loss,
            val_loss=val_loss,
            published_train_loss=published_train_loss,
            published_val_loss=published_val_loss,
            best_val_loss=best_val_loss,
            best_iter=best_iter,
            params=count_parameters(model),
            train_s=round(run["train_s"], 2),
            ms_per_iter=round(1e3 * run["train_s"] / config.max_iters, 3),
            torch=torch.__version__,
            data=os.path.basename(os.path.abspath(config.data)),
            data_crc32=run["crc32"],
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
def gpt2_tokenizer():
    """GPT-2's tokenizer; without it, None and a hint."""
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except Exception:  # it is not installed, or cannot load its vocabulary
        warn("these are token ids of GPT-2; for text, pip install tiktoken")

def sample(model, chars, config):
    """Print the prompt, or the first of chars, and what the model generates after it."""
    torch.manual_seed(config.seed)
    if config.compile:
        torch.compiler.set_stance("force_eager")  # each length is new, and not worth compiling for
    tokenizer = gpt2_tokenizer() if chars == GPT2_IDS else None
    pieces = config.prompt or chars[:1]
    if config.prompt and tokenizer:
        pieces = [f"{i} " for i in tokenizer.encode(config.prompt, allowed_special="all")]
    elif config.prompt and chars == GPT2_IDS:
        pieces = [f"{i} " for i in config.prompt.split()]
    for piece in pieces:
        if piece not in chars:
            fail(f"--prompt: the model does not know {piece!r}")
    ids = [chars.index(piece) for piece in pieces]
    idx = torch.tensor(ids, device=config.device).repeat(config.num_samples, 1)  # (num_samples, T)
    options = (config.max_new_tokens, config.temperature, config.top_k)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        if config.num_samples == 1 and not tokenizer:
            write("".join(pieces), config)
            for idx_next in model.stream(idx, *options):
                write(chars[idx_next.item()], config)
            write("\n", config)
            return
        rows = model.generate(idx, *options).tolist()
    for row in rows:
        if tokenizer:
            text = tokenizer.decode([token for token in row if token < 50257])  # the rest is padding
        else:
            text = "".join(chars[token] for token in row)
        log(text, config)
        if config.num_samples > 1:
            log("-" * 20, config)

def main():
    """Train and sample as the command line says -> model, chars."""
    config = parse_args()
    if ranks()[0] > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a character that cannot be shown becomes "?"
    model, chars = None, None
    stops = []
    try:
        if config.generate:
            model, chars = load(config.generate, config)
        else:
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
