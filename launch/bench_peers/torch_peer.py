"""What the torch peers share: the model, a tokenizer without files, timers, the report."""

import itertools
import json
import sys
import time

import tokenizers
import torch
import transformers

PAD, EOS = 0, 1


def start() -> dict:
  """The spec from standard input, with torch set to its number of threads."""
  spec = json.load(sys.stdin)
  torch.set_num_threads(spec["threads"])
  torch.manual_seed(0)
  return spec


def qwen3(spec: dict) -> transformers.Qwen3ForCausalLM:
  """The model, randomly initialised."""
  m = spec["model"]
  config = transformers.Qwen3Config(
    vocab_size=m["vocab_size"],
    hidden_size=m["width"],
    num_hidden_layers=m["layers"],
    num_attention_heads=m["heads"],
    num_key_value_heads=m["kv_heads"],
    head_dim=m["head_dim"],
    intermediate_size=m["hidden"],
    rms_norm_eps=m["norm_epsilon"],
    rope_parameters={"rope_type": "default", "rope_theta": m["rope_theta"]},
    tie_word_embeddings=True,
    attn_implementation="sdpa",
    pad_token_id=PAD,
    eos_token_id=EOS,
  )
  return transformers.Qwen3ForCausalLM(config)


def word(token: int) -> str:
  """The text of a token. None begins with another: a special token is found inside words, too."""
  return f"t{token:05d}"


def text(tokens: torch.Tensor) -> str:
  """The text of a row of tokens."""
  return " ".join(map(word, tokens.tolist()))


def tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
  """One token a word."""
  words = {word(i): i for i in range(vocab_size)}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=word(PAD)))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, pad_token=word(PAD), eos_token=word(EOS), padding_side="left"
  )


def random_tokens(spec: dict, rows: int, length: int) -> torch.Tensor:
  """[rows, length] ordinary tokens."""
  return torch.randint(2, spec["model"]["vocab_size"], (rows, length))


class StepClock(transformers.TrainerCallback):
  """When each optimizer step of a transformers `Trainer` was over."""

  def __init__(self):
    self.times = []

  def on_step_end(self, *_, **__):
    self.times.append(time.perf_counter())

  def seconds(self, steps: int, repeats: int) -> list[float]:
    """Seconds of the last `repeats` groups of `steps` steps, everything between them included."""
    ends = self.times[-repeats * steps - 1 :: steps]
    return [after - before for before, after in itertools.pairwise(ends)]


TRAINER = {  # the fastest plain settings of a Trainer on a CPU
  "use_cpu": True,
  "bf16": False,
  "gradient_checkpointing": False,
  "optim": "adamw_torch_fused",
  "lr_scheduler_type": "constant",
  "logging_strategy": "no",
  "save_strategy": "no",
  "report_to": [],
  "disable_tqdm": True,
  "dataloader_pin_memory": False,
}


def report(peer: str, task: str, seconds: list[float], tokens: int, settings: str) -> None:
  """The line that `launch.bench` reads."""
  versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
  line = {"peer": peer, "task": task, "seconds": seconds, "tokens": tokens}
  print(json.dumps(line | {"settings": f"{settings}; {versions}"}))
