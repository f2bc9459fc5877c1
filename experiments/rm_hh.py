"""draft"""

import dataclasses
import functools
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pt_jax import recipes
from pt_jax.data.chat_templates import load_template
from pt_jax.data.groups import Group
from pt_jax.data.hf_tokenizer import HFTokenizer
from pt_jax.data.masks import encode_chat
from pt_jax.data.messages import Message
from pt_jax.data.mixtures import Mixture
from pt_jax.data.packing import Example
from pt_jax.data.pipeline import Layout
from pt_jax.data.sources import MemorySource
from pt_jax.data.tokenizers import Tokenizer
from pt_jax.experiment import ComparisonData, Experiment, Reward, Supervised, SupervisedData
from pt_jax.losses.reward import RewardObjective
from pt_jax.steps.optimizer import AdamW

PATH = "../shared/data/hh_rlhf/test.jsonl.gz"  # 2312 rows {"chosen", "rejected"}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "chatml"
TURN = re.compile(r"\n\n(Human|Assistant):")
Part = Literal["train", "validation", "held_out"]


def messages(transcript: str) -> list[Message]:
  parts = TURN.split(transcript)
  roles = {"Human": "user", "Assistant": "assistant"}
  return [
    {"role": roles[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2])
  ]


def part_of(row: Mapping[str, Any]) -> Part:
  opening = TURN.split(row["chosen"])[2].strip().lower()
  place = zlib.crc32(opening.encode()) % 10
  return "held_out" if place < 3 else "validation" if place < 5 else "train"


@functools.cache
def rows(path: str) -> dict[Part, list[dict[str, str]]]:
  kept: dict[Part, list[dict[str, str]]] = {"train": [], "validation": [], "held_out": []}
  with gzip.open(path, "rt", encoding="utf-8") as file:
    source = [json.loads(line) for line in file]
  for row in source:
    chosen, rejected = messages(row["chosen"]), messages(row["rejected"])
    if chosen[:-1] == rejected[:-1] and all(
      side[-1]["role"] == "assistant" and side[-1]["content"] for side in (chosen, rejected)
    ) and chosen != rejected:
      kept[part_of(row)].append(row)
  return kept


@functools.cache
def bpe(path: str, vocab_size: int) -> Tokenizer:
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator((row["chosen"] for row in rows(path)["train"]), trainer)
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "tokenizer.json"
    tokenizer.save(str(file))
    return HFTokenizer(file)


def parts(path: str, validate: bool):
  r = rows(path)
  if validate: return r["train"], r["validation"]
  return r["train"] + r["validation"], r["held_out"]


def clip_chat(chat, turns):
  return chat[-turns:] if turns else chat

def transcripts(tokenizer: Tokenizer, *, path: str, validate: bool, seed: int) -> SupervisedData:
  template = load_template(TEMPLATE, tokenizer=tokenizer)
  def encode(row):
    encoded = encode_chat(messages(row["chosen"]), tokenizer, template)
    return Example(encoded.tokens, encoded.mask)
  train, held_out = parts(path, validate)
  return SupervisedData(Mixture({"hh": MemorySource(train, path)}, seed=seed), MemorySource(held_out, path), encode)


def pairs(tokenizer: Tokenizer, *, path: str, validate: bool, seed: int, turns: int) -> ComparisonData:
  template = load_template(TEMPLATE, tokenizer=tokenizer)
  def encode(row):
    completions = []
    for side in ("chosen", "rejected"):
      encoded = encode_chat(clip_chat(messages(row[side]), turns), tokenizer, template, turns="last")
      completions.append(Example(encoded.tokens, encoded.mask))
    return Group(tuple(completions), (1.0, 0.0))
  train, held_out = parts(path, validate)
  return ComparisonData(Mixture({"hh": MemorySource(train, path)}, seed=seed), MemorySource(held_out, path), encode, slice=turns_of)

def turns_of(row) -> str:
  n = len(messages(row["chosen"])) // 2
  return f"{n}_turns" if n < 4 else "4_turns_or_more"


def config(
  *, path: str = PATH, validate: bool = True, sft_steps: int = 120, steps: int = 120, sft_lr: float = 2e-3, lr: float = 5e-4,
  members: int = 3, center: float = 0.0, bootstrap: bool = True, vocab: int = 1024, width: int = 128, layers: int = 2,
  batch_size: int = 16, row_length: int = 512, turns: int = 2, weight_decay: float = 0.1, seed: int = 0, evaluate_every: int = 20,
  head_lr: float = 1.0,
) -> Experiment:
  tokenizer = functools.partial(bpe, path, vocab)
  from pt_jax.steps.optimizer import Group as G
  sft = Supervised(
    name="sft",
    data=functools.partial(transcripts, path=path, validate=validate, seed=seed),
    layout=Layout(batch_size, row_length, too_long="drop"),
    optimizer=AdamW(sft_lr, steps=sft_steps, warmup=max(1,sft_steps // 10), weight_decay=0.1),
    evaluate_every=max(1, sft_steps // 2),
  )
  reward = Reward(
    name="reward",
    data=functools.partial(pairs, path=path, validate=validate, seed=seed, turns=turns),
    objective=RewardObjective(center=center, bootstrap=bootstrap and members > 1),
    members=members,
    layout=Layout(batch_size, row_length, too_long="drop"),
    optimizer=AdamW(lr, steps=steps, warmup=max(1,steps // 10), weight_decay=weight_decay),
    evaluate_every=evaluate_every,
  )
  return Experiment(
    name="rm_hh", stages=(sft, reward), tokenizer=tokenizer,
    model=recipes.small_decoder(tokenizer().vocab_size, width=width, layers=layers, max_length=2 * row_length), seed=seed,
  )
