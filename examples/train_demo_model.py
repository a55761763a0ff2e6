"""Train a small Mistral-architecture language model on plain text, from scratch, on one GPU or on a CPU.

    python examples/train_demo_model.py OUT --text a.txt b.txt.xz --heldout c.txt --minutes 7

Text is UTF-8, plain or .xz; documents are separated by a line `<|endoftext|>`. OUT becomes a Hugging Face checkpoint:
bfloat16 safetensors, a byte-level BPE tokenizer trained on the same text, and `training.json`, the record of the run.

Weight matrices are trained with Muon (momentum made orthogonal by Newton-Schulz iterations, Jordan 2024), embeddings
and norms with AdamW. The learning rate rises over 100 steps, stays, and falls to zero over the second half of the run.
"""

import argparse
import json
import lzma
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
BOS, EOS = 0, 1  # the first two entries of the vocabulary
PIECE = 100_000  # characters; a longer document is encoded in pieces, each between its own <s> and </s>
MIN_VOCAB = 256 + 2  # every byte, <s> and </s>


class RecipeError(Exception):
    """Something the user can put right, said in one sentence."""


# --- text ------------------------------------------------------------------------------------------------------------


def read_documents(files: list[Path]) -> list[str]:
    documents = []
    for file in files:
        try:
            with lzma.open(file, "rt", encoding="utf-8") if file.suffix == ".xz" else open(file, encoding="utf-8") as f:
                text = f.read()
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RecipeError(f"cannot read {file} as UTF-8 text: {reason}") from error
        documents += [document.strip() for document in text.split(SEPARATOR) if document.strip()]
    return documents


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # merges are learnt from about 40 million characters, taken in samples spread evenly over the text
    every = max(1, sum(map(len, documents)) // 40_000_000)
    samples = (d[i : i + 20_000] for d in documents for i in range(0, len(d), 20_000 * every))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(samples, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """All documents as one row of tokens, int32."""
    pieces = [d[i : i + PIECE] for d in documents for i in range(0, len(d), PIECE)]
    rows = [np.empty(0, np.int32)]
    for k in range(0, len(pieces), 512):
        rows += [np.array([BOS, *e.ids, EOS], np.int32) for e in tokenizer.encode_batch(pieces[k : k + 512])]
    return torch.from_numpy(np.concatenate(rows))


# --- model and optimisers --------------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        sliding_window=None,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        rms_norm_eps=1e-5,
    )
    return MistralForCausalLM(config)


def orthogonalise(gradients: Tensor) -> Tensor:
    """Push the singular values of each matrix [N, rows, columns] towards 1, by five Newton-Schulz steps."""
    x = gradients.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon:
    """Nesterov momentum whose step is made orthogonal. Matrices of one shape are handled as one batch."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for p in matrices:
            self.groups[p.shape[0], p.shape[1]].append(p)
        self.averages = {shape: torch.zeros_like(torch.stack(group)) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for (rows, columns), group in self.groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            average = self.averages[rows, columns].lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(average, self.momentum)).float()
            for p, u in zip(group, update, strict=True):
                p.mul_(1 - self.weight_decay * lr).add_(u, alpha=-lr * max(1, rows / columns) ** 0.5)


# --- training and evaluation -----------------------------------------------------------------------------------------


def progress(args: argparse.Namespace) -> Callable[[int], float]:
    """Steps done -> share of the run that is done, by the clock or, where --steps is given, by count."""
    start = time.time()
    if args.steps is not None:
        return lambda step: step / args.steps
    return lambda step: (time.time() - start) / (60 * args.minutes)


def train(model: MistralForCausalLM, data: Tensor, args: argparse.Namespace) -> tuple[int, int]:
    """Train in place. Returns the numbers of steps and of tokens seen."""
    device = data.device
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(x, labels=x).loss

    train_loss = torch.compile(loss_of) if args.compile else loss_of
    generator = torch.Generator(device=device).manual_seed(args.seed)
    offsets = torch.arange(args.seq, device=device)
    sample_every = max(1, args.log_every // 20)  # reading the loss waits for the GPU: not at every step
    average, step, tokens, start, done = math.nan, 0, 0, time.time(), progress(args)
    while (share := done(step)) < 1:
        scale = min(1, (step + 1) / 100) * min(1, (1 - share) / 0.5)
        begin = torch.randint(len(data) - args.seq, (args.batch, 1), generator=generator, device=device)
        loss = train_loss(data[begin + offsets].long())  # [batch, seq]
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * scale
        adam.step()
        muon.step(args.lr * scale)
        model.zero_grad(set_to_none=True)
        step += 1
        tokens += args.batch * args.seq
        if step % sample_every == 0 or step < 3:
            value = loss.item()
            if not math.isfinite(value):
                raise RecipeError(f"the loss became {value} at step {step}; lower --lr or --adam-lr")
            average = value if math.isnan(average) else 0.9 * average + 0.1 * value
        if step % args.log_every == 0 or step < 3:
            speed = tokens / (time.time() - start)
            seen = f"tokens {tokens / 1e6:.1f}M tok/s {speed:.0f}"
            print(f"step {step} loss {average:.3f} {seen} at {share:.3f}", flush=True)
    return step, tokens


@torch.no_grad()
def perplexity(model: MistralForCausalLM, ids: Tensor, seq: int) -> float | None:
    """A token's perplexity over whole sequences, each from an empty context; None for less text than one sequence."""
    if len(ids) < seq:
        return None
    total, count = 0.0, 0
    for x in ids[: len(ids) // seq * seq].view(-1, seq).split(16):
        x = x.to(model.device).long()
        logits = model(x).logits[:, :-1].float()  # [16, seq - 1, vocab]
        total += F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
        count += x[:, 1:].numel()
    return round(math.exp(total / count), 3)


# --- the program -----------------------------------------------------------------------------------------------------


def check_output(out: Path, force: bool) -> None:
    """Refuse to overwrite anything, or with --force anything but an earlier result or an empty folder."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise RecipeError(f"{out} exists and is not a folder")
    if not force:
        raise RecipeError(f"{out} exists; give another folder, or --force to replace it")
    if any(out.iterdir()) and not (out / "training.json").is_file():
        raise RecipeError(f"{out} was not written by this program, so --force leaves it alone")


def replace_folder(new: Path, out: Path, force: bool) -> None:
    """Put `new` where `out` is. The old folder is kept beside `new` until the new one stands."""
    check_output(out, force)  # again: training took a while
    out.parent.mkdir(parents=True, exist_ok=True)
    old = new.with_name("old")
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def run(args: argparse.Namespace, workspace: Path) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    documents = read_documents(sorted(args.text, key=str))
    if not documents:
        raise RecipeError("the text files hold no text")
    heldout = {file.name: read_documents([file]) for file in args.heldout}

    bpe = train_tokenizer(documents, args.vocab)
    data = encode(bpe, documents).to(device)
    if len(data) <= args.seq:
        raise RecipeError(f"too little text: {len(data)} tokens, where more than one sequence of {args.seq} is needed")
    print(f"train tokens {len(data)}", flush=True)

    model = build_model(args).to(device)
    print(f"parameters {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M on {device.type}", flush=True)
    steps, tokens = train(model, data, args)

    model.to(torch.bfloat16).eval()
    record = {
        "tokens_seen": tokens,
        "train_tokens": len(data),
        "steps": steps,
        "heldout_perplexity": {name: perplexity(model, encode(bpe, d), args.seq) for name, d in heldout.items()},
    }
    print(json.dumps(record), flush=True)
    unused = {"out", "text", "heldout", "force", "steps" if args.steps is None else "minutes"}
    record["arguments"] = {key: value for key, value in vars(args).items() if key not in unused}

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    new = workspace / "new"
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    (new / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    replace_folder(new, args.out, args.force)

    prompt = tokenizer("Once upon a time", return_tensors="pt").to(device)
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=80, do_sample=False)[0]), flush=True)


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse says: invalid positive int value: '-1'
    return parse


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: python examples/train_demo_model.py out --text stories.txt --heldout others.txt --minutes 7",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, count, rate = parser.add_argument, positive(int), positive(float)
    add("out", type=Path, help="folder to write, which must not exist yet")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="training text, .txt or .txt.xz")
    add("--heldout", type=Path, nargs="+", default=[], metavar="FILE", help="text to measure perplexity on at the end")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=rate, default=7.0, help="train for this long, compilation included")
    length.add_argument("--steps", type=count, help="train for this many steps instead; repeatable, by seed, on a CPU")
    add("--hidden", type=count, default=256, help="width of the model")
    add("--intermediate", type=count, default=896, help="width of the gated MLP")
    add("--layers", type=count, default=8, help="number of layers")
    add("--heads", type=count, default=8, help="attention heads")
    add("--kv-heads", type=count, default=4, help="key/value heads")
    add("--vocab", type=count, default=4096, help=f"size of the vocabulary, at least {MIN_VOCAB}")
    add("--seq", type=count, default=512, help="tokens a sequence")
    add("--batch", type=count, default=64, help="sequences a step")
    add("--lr", type=rate, default=0.02, help="learning rate of Muon")
    add("--adam-lr", type=rate, default=3e-3, help="learning rate of AdamW")
    add("--seed", type=int, default=0, help="seed of the weights and of the order of the text")
    add("--log-every", type=count, default=400, help="print a line every so many steps")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    add("--force", action="store_true", help="replace OUT if it holds an earlier result")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    if not args.text:
        raise RecipeError("no text files: name at least one with --text")
    if args.hidden % (2 * args.heads):
        raise RecipeError(f"--hidden {args.hidden} must be a multiple of twice --heads {args.heads}")
    if args.heads % args.kv_heads:
        raise RecipeError(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    if args.vocab < MIN_VOCAB:
        raise RecipeError(f"--vocab {args.vocab} must be at least {MIN_VOCAB}: every byte, <s> and </s>")
    if not 2 <= args.seq <= 2048:
        raise RecipeError(f"--seq {args.seq} must be between 2 and 2048")
    check_output(args.out, args.force)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        check_arguments(args)
        args.out = args.out.absolute()
        parent = next(p for p in args.out.parents if p.is_dir())
        # everything is written beside OUT, so that moving it into place is one rename on one file system
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{args.out.name}-") as workspace:
            run(args, Path(workspace))
    except (RecipeError, OSError) as error:
        sys.exit(f"train_demo_model: {error}")


if __name__ == "__main__":
    main()
