"""What the rollout engine saves: prompts that a group shares, and tokens that are guessed.

  python -m launch.bench_engine

The model is `launch.bench`'s. Untrained, with tied embeddings, it repeats itself when it is greedy
(nearly every guess is right) and says anything at temperature 1 (nearly every guess is wrong): the
best and the worst that guessing can do on this machine. Ratios are of timings taken in turns in one
process.
"""

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import tyro

from launch import bench_tasks, host
from launch.bench_peers.spec import SPEC
from pt_jax import sharding
from pt_jax.data.tokenizers import ByteTokenizer
from pt_jax.models.config import ModelConfig
from pt_jax.rollout.engine import Engine
from pt_jax.rollout.proposals import Speculation
from pt_jax.rollout.rollouts import SamplingParams
from pt_jax.serve.load import find
from pt_jax.weights import Params

PROBLEMS = "../shared/data/gsm8k/train.jsonl"
PROMPTS, GROUP = 48, 8  # of a GRPO batch


def main(problems: str = PROBLEMS, repeats: int = 5, run: pathlib.Path | None = None) -> None:
  """Prints what prefix sharing saves on a GRPO batch, and what n-gram speculation does to decoding.

  Args:
    problems: JSON lines with a "question", the prompts of the batch as bytes; without such a file
      that part is left out.
    repeats: timings of each kind; the medians are shown.
    run: a folder of a run, to guess what its policy says, too.
  """
  if host.choose_platform() == "cpu":
    host.use_cpu(SPEC["threads"])
  with jax.set_mesh(sharding.make_mesh(data=-1)):
    config, _, state = bench_tasks.start()
    if pathlib.Path(problems).exists():
      share_prompts(config, state.params, _questions(problems), repeats)
    else:
      print(f"prompts that a group shares: left out, --problems: no file {problems}")
    speculate(config, state.params, repeats)
    if run is not None:
      speculate_on(run, repeats)


def _questions(path: str) -> list[list[int]]:
  lines = pathlib.Path(path).read_text().splitlines()[:PROMPTS]
  return [ByteTokenizer().encode(json.loads(line)["question"]) for line in lines]


def share_prompts(
  config: ModelConfig, params: Params, prompts: Sequence[Sequence[int]], repeats: int
) -> None:
  """Tokens of prompts that are computed for a GRPO batch, with a group's prompt in common and with
  one of its own for every completion (two tokens in front of it make it another)."""
  length, new = max(map(len, prompts)) + 2, 32
  engine = Engine(config, params, slots=64, max_length=length + new)
  sampling = SamplingParams(max_tokens=new)
  apart = [[i // 256, i % 256, *p] for i, p in enumerate(p for p in prompts for _ in range(GROUP))]
  together = [[0, 0, *p] for p in prompts]
  found: dict[str, tuple[int, list[float]]] = {}
  for i in range(repeats + 1):
    for name, asked, n in (("shared", together, GROUP), ("not shared", apart, 1)):
      before, started = engine.figures.copy(), time.perf_counter()
      engine.generate(asked, sampling, key=jax.random.key(i), n=n)
      spent = time.perf_counter() - started
      computed = engine.figures.prefilled - before.prefilled
      found[name] = (computed, [*found.get(name, (0, []))[1], spent][-repeats:])
  print(
    f"{len(prompts)} prompts of {len(prompts[0])}... bytes, {GROUP} completions each, {new} tokens"
  )
  for name, (computed, times) in found.items():
    print(f"  prompt {name:10}  prefill tokens {computed:7}  {statistics.median(times):.3f} s")


def speculate(config: ModelConfig, params: Params, repeats: int) -> None:
  """Tokens/s of decoding with and without guesses, for one sequence and for 64 at once."""
  print("n-grams of 3, 4 guesses")
  for name, temperature in {"repeats itself": 0.0, "says anything": 1.0}.items():
    sampling = SamplingParams(max_tokens=128, temperature=temperature)
    prompts = bench_tasks.random_prompts(64, 32, config.vocab_size)
    _speculate(name, config, params, prompts, sampling, repeats)


def speculate_on(folder: pathlib.Path, repeats: int) -> None:
  """The same with what a run has trained, on the prompts of its samples, greedy."""
  source = find(folder)
  lines = (folder / "samples.jsonl").read_text().splitlines()
  texts = list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))[:64]
  prompts = [source.tokenizer.encode(text) for text in texts]
  ends = () if source.tokenizer.eos_id is None else (source.tokenizer.eos_id,)
  sampling = SamplingParams(max_tokens=64, temperature=0.0, stop_tokens=ends)
  params = source.params(jax.sharding.get_mesh())
  _speculate(folder.parent.name, source.config, params, prompts, sampling, repeats)


def _speculate(
  name: str,
  config: ModelConfig,
  params: Params,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingParams,
  repeats: int,
) -> None:
  length = max(map(len, prompts)) + sampling.max_tokens
  for batch in (1, len(prompts)):
    slots = -(-batch // jax.device_count()) * jax.device_count()
    engines = [
      Engine(config, params, slots=slots, max_length=length, speculation=s)
      for s in (None, Speculation(tokens=4, ngram=3))
    ]
    rates: list[list[float]] = [[], []]
    before, same = engines[1].figures.copy(), []
    for i in range(repeats + 2):
      found = []
      for engine, own in zip(engines, rates):
        started = time.perf_counter()
        own_prompts = prompts[i % len(prompts) :][:1] if batch == 1 else prompts
        found.append(engine.generate(own_prompts, sampling, key=jax.random.key(i)))
        tokens = int((found[-1].length - found[-1].prompt_length).sum())
        own.append(tokens / (time.perf_counter() - started))
      assert found[0].tokens.shape == found[1].tokens.shape
      same += (found[0].tokens == found[1].tokens).all(1).tolist()
    # A uniform number within rounding of the border of two tokens draws the other one, and the rest
    # of that sequence is another (seen: 1 of 57,344 draws). Wrong guesses would change nearly all.
    assert np.mean(same) > 0.8, f"{np.mean(same):.2f} of the sequences are the same with guesses"
    plain, guessed = (statistics.median(own[2:]) for own in rates)
    shares = engines[1].figures.since(before)
    print(
      f"  {batch:2} at once, {name:14}  without {plain:6.0f} tokens/s  with {guessed:6.0f}"
      f"  ratio {guessed / plain:4.2f}  accepted {shares['accepted']:4.2f}"
      f"  tokens per step {shares['tokens_per_step']:4.2f}",
      flush=True,
    )


if __name__ == "__main__":
  sys.exit(tyro.cli(main))
