"""Trains a small OPT from scratch, the second architecture of the accuracy table.

    python -m rankbook.tools.dev.small_model --text calib.txt -o small-opt

OPT (Zhang et al. 2022) differs from the Llama family in all that matters to quantization: LayerNorm, biases, ReLU,
learned positions. A few million weights learn enough of one text for rounding to hurt; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankbook.tools.errors import USAGE

_VOCABULARY = 2048
_LENGTH = 512
"""Tokens of a window, in training and of the positions that the model knows."""

_BATCH = 4
_LEAST_STEPS = 20
"""A tenth of the steps warm the optimizer up: two at least."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train tokenizer and model, save both as one Hugging Face folder."""
    args = _parser().parse_args(argv)
    if args.output.exists():
        print(f"{args.output} exists; name a new folder", file=sys.stderr)
        return USAGE
    if args.steps < _LEAST_STEPS:
        print(f"--steps {args.steps} is too few; {_LEAST_STEPS} or more", file=sys.stderr)
        return USAGE
    text = args.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    model = train(text, tokenizer, args.steps, args.seed)
    draft = args.output.with_name(args.output.name + ".tmp")
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.rename(args.output)
    return 0


def train_tokenizer(text: str) -> Any:
    """Learn byte pairs of the text: 2048 tokens, one of them the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(tokenizer_object=pairs, eos_token="</s>")


def train(text: str, tokenizer: Any, steps: int, seed: int) -> Any:
    """Train an OPT of 4 blocks and 256 channels on random windows; return it in float32."""
    import torch
    from rich.progress import track
    from transformers import OPTConfig, OPTForCausalLM

    from rankbook.calibration.training.reconstruct import arithmetic, compute_dtype

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        word_embed_proj_dim=256,
        ffn_dim=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=_LENGTH,
        dropout=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = OPTForCausalLM(config).train()
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in track(range(steps), description="training", disable=not sys.stderr.isatty()):
        starts = torch.randint(len(tokens) - _LENGTH, (_BATCH,))
        batch = torch.stack([tokens[start : start + _LENGTH] for start in starts.tolist()])
        with arithmetic(compute_dtype("auto")):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"last training loss {loss.item():.3f} nats per token", file=sys.stderr)
    return model.eval()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rankbook.tools.dev.small_model", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--text", type=Path, required=True, help="training text; use the calibration text")
    parser.add_argument("--steps", type=int, default=600, help="training steps of 4 x 512 tokens (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
