"""The preference stage on a byte model of one layer: it learns, resumes exactly, caches its
reference."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from pt_jax import metrics, sharding
from pt_jax.data.groups import Group
from pt_jax.data.mixtures import Mixture
from pt_jax.data.pipeline import Layout
from pt_jax.data.sources import MemorySource
from pt_jax.data.tokenizers import ByteTokenizer
from pt_jax.experiment import EarlyStop
from pt_jax.loops import checks, offline, pipeline, preference, reference
from pt_jax.losses import preference_objective as objectives
from pt_jax.models import decoder
from tests.loops import pairs, tiny
from tests.loops.runs import Interrupted, bits, interrupted_at, logged, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupted, with its report."""
  return run(tmp_path_factory.mktemp("whole"), pairs.experiment())


def rows_of(folder, name):
  return [row for row in metrics.read_jsonl(folder / "metrics.jsonl") if name in row]


def test_it_learns_to_prefer(whole):
  held_out = rows_of(whole.folder, "eval/margin")
  assert [row["step"] for row in held_out] == [0, 6, 12]
  first, last = held_out[0], held_out[-1]
  # The policy is its reference: every pair is a draw.
  assert first["eval/margin"] == 0 and first["eval/accuracy"] == 0.5
  assert first["eval/loss"] == pytest.approx(np.log(2), rel=1e-6)
  assert last["eval/accuracy"] > 0.8 and last["eval/margin"] > 0.1
  assert last["eval/accuracy_low"] > 0.5 and last["eval/accuracy_high"] <= 1
  assert last["eval/loss"] < first["eval/loss"]
  assert last["eval/margin"] == pytest.approx(
    last["eval/chosen_reward"] - last["eval/rejected_reward"], rel=1e-5
  )
  assert last["eval/chosen_reward"] == pytest.approx(0.1 * last["eval/chosen_logprob_change"])
  expected = {"steps": 12.0} | {k: v for k, v in last.items() if k.startswith("eval/")}
  assert whole.results["dpo"] == expected


def test_slices_add_up_and_the_least_separated_is_first(whole):
  results = whole.results["dpo"]
  names = [name.split("/")[2] for name in results if name.endswith("/margin") and "slice" in name]
  by_slice = {
    what: np.array([results[f"eval/slice/{name}/{what}"] for name in names])
    for what in ("margin", "accuracy", "count")
  }
  words = [row["word"] for row in tiny.words(20, 2)]
  assert sorted(names) == sorted({word[0] for word in words}) and len(names) > 2
  counts = [sum(word[0] == name for word in words) for name in names]
  np.testing.assert_array_equal(by_slice["count"], counts)
  assert (np.diff(by_slice["margin"]) >= 0).all()
  for what in ("margin", "accuracy"):
    mean = np.average(by_slice[what], weights=counts)
    assert results[f"eval/{what}"] == pytest.approx(mean, rel=1e-5)


def test_outputs_are_in_the_order_of_the_held_out_rows(whole, one_device):
  """The margin of each held-out pair, row by row and alone, from the parameters that it left."""
  outputs = offline.read_outputs(whole.folder, "dpo")
  assert outputs is not None and outputs.rows.tolist() == [*range(20)]
  start = jax.jit(lambda key: decoder.init(key, tiny.MODEL, sharding.USE))(jax.random.key(0))
  for i in (3, 11):
    group = pairs.encode(tiny.words(20, 2)[i])
    change = [
      logprob(whole.params, completion) - logprob(start, completion)
      for completion in group.completions
    ]
    margin = 0.1 * (change[0] - change[1])
    assert outputs.values["margin"][i] == pytest.approx(margin, rel=1e-4)
    assert outputs.values["chosen_logprob_change"][i] == pytest.approx(change[0], rel=1e-4)


@functools.cache
def forward():
  return jax.jit(functools.partial(decoder.forward, c=tiny.MODEL))


def logprob(params, completion) -> float:
  """Sum over the trained tokens of one completion, in NumPy from its logits."""
  params = jax.tree.map(np.asarray, params)
  count = len(completion.tokens)
  tokens = np.zeros((1, 32), np.int32)
  tokens[0, :count] = completion.tokens
  segments = np.where(np.arange(32) < count, 0, -1)[None]
  hidden = forward()(params, tokens=tokens, positions=np.arange(32)[None], segment_ids=segments)
  logits = np.asarray(hidden[0], np.float64) @ np.asarray(params["unembed"], np.float64).T
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  return sum(logits[t - 1, completion.tokens[t]] for t in np.flatnonzero(completion.mask))


def test_what_is_logged_has_the_names_that_early_stops_may_watch(whole):
  step, evaluation = preference.metric_names(objectives.dpo())
  found = {frozenset(row.keys() - {"stage", "step"}) for row in rows_of(whole.folder, "loss")}
  assert found == {frozenset(step)}
  for row in rows_of(whole.folder, "eval/margin"):
    names = {n for n in row.keys() - {"stage", "step"} if not n.startswith("eval/slice/")}
    assert names == set(evaluation)


def test_the_report_shows_the_margins(whole):
  text = (whole.folder / "report.md").read_text()
  assert "(dpo_margins.png)" in text and "eval/slice/" in text
  assert (whole.folder / "dpo_margins.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def no_report(monkeypatch):
  monkeypatch.setattr(pipeline.report, "write_report", lambda *_: None)


def test_interrupted_and_resumed_is_bitwise_the_same(whole, tmp_path, monkeypatch, no_report):
  for step in (3, 5, 4):
    with monkeypatch.context() as patch:
      interrupted_at(step, patch)
      with pytest.raises(Interrupted):
        run(tmp_path, pairs.experiment())
  resumed = run(tmp_path, pairs.experiment())
  assert bits(resumed.params) == bits(whole.params)
  assert logged(resumed.folder) == logged(whole.folder)
  assert resumed.results == whole.results


CACHED = functools.partial(pairs.stage, reference="cached")


@pytest.fixture
def scored(monkeypatch):
  """The batches whose reference log-probs were computed before the first update."""
  seen = []
  real = preference.compiled_score

  def counting(config):
    def counted(params, batch):
      seen.append(batch)
      return real(config)(params, batch)

    return counted

  monkeypatch.setattr(preference, "compiled_score", counting)
  return seen


def test_cached_reference_gives_the_same_losses(whole, tmp_path, monkeypatch, scored, no_report):
  with monkeypatch.context() as patch:
    interrupted_at(7, patch)
    with pytest.raises(Interrupted):
      run(tmp_path, pairs.experiment(CACHED()))
  first = len(scored)
  assert first > 5
  cached = run(tmp_path, pairs.experiment(CACHED()))
  assert len(scored) == first  # the resumed run found all of them on disk
  for ours, theirs in zip(
    metrics.read_jsonl(cached.folder / "metrics.jsonl"),
    metrics.read_jsonl(whole.folder / "metrics.jsonl"),
    strict=True,
  ):
    assert ours.keys() == theirs.keys()
    for name in ("loss", "eval/loss", "eval/margin", "optimizer/grad_norm"):
      if name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), name


def changed_row(tokenizer):
  """One word that the cache has not seen, in one place."""
  rows = tiny.words(200, 1)
  rows[7] = {"word": "eeee"}
  train = Mixture({"words": MemorySource(rows, "train")}, seed=0)
  return dataclasses.replace(pairs.data(tokenizer), train=train)


def test_a_changed_row_or_other_weights_miss_the_cache(tmp_path, one_device):
  data, layout = pairs.data(ByteTokenizer()), Layout(batch_size=4, row_length=32)
  mesh = jax.sharding.get_mesh()
  params = [
    jax.jit(lambda key: decoder.init(key, tiny.MODEL, sharding.USE))(jax.random.key(seed))
    for seed in (0, 1)
  ]
  one, calls = preference.compiled_score(tiny.MODEL), []

  def cached(data, number):
    calls.clear()

    def score(batch):
      calls.append(batch)
      return one(params[number], batch)

    folder = tmp_path / reference.params_hash(params[number])
    return reference.cached(data, layout, score, folder, mesh)

  known = cached(data, 0)
  assert len(calls) > 5 and cached(data, 0).keys() == known.keys() and not calls
  other = cached(changed_row(ByteTokenizer()), 0)
  assert len(calls) == 1 and len(other) == len(known) + 2
  moved = cached(data, 1)
  assert len(calls) > 5 and moved.keys() == known.keys()
  for key, values in known.items():
    np.testing.assert_array_equal(values, other[key])
    assert not np.array_equal(values, moved[key])


def test_the_hash_is_of_parameters_and_of_what_is_trained(one_device):
  params = {"a": np.arange(3, dtype=np.int32), "b": {"c": np.zeros(2, np.float32)}}
  own = reference.params_hash(params)
  assert own == reference.params_hash(jax.tree.map(np.copy, params))
  for changed in (
    {**params, "a": np.array([0, 1, 3], np.int32)},
    {"a": params["a"], "b": {"d": params["b"]["c"]}},
    {**params, "a": params["a"].astype(np.float32)},
  ):
    assert reference.params_hash(changed) != own
  example = pairs.completion("ab", "ba")
  masked = example._replace(mask=np.r_[example.mask[:-1], 0].astype(np.float32))
  prompt = example._replace(mask=np.r_[1, example.mask[1:]].astype(np.float32))
  longer = pairs.completion("ab", "bab")
  own = reference.completion_hash(example)
  assert reference.completion_hash(prompt) == own  # nothing predicts the first token
  assert len({own, *map(reference.completion_hash, (masked, longer))}) == 3


def test_labelled_completions(tmp_path, no_report):
  """KTO: the baseline is logged, and held-out rows are pairs."""
  objective = objectives.kto()
  stage = pairs.stage(objective=objective, data=pairs.unpaired)
  finished = run(tmp_path, pairs.experiment(stage))
  step, _ = preference.metric_names(objective)
  logged_steps = rows_of(finished.folder, "loss")
  assert {frozenset(row.keys() - {"stage", "step"}) for row in logged_steps} == {frozenset(step)}
  assert logged_steps[0]["preference/baseline"] == 0 != logged_steps[1]["preference/baseline"]
  assert finished.results["dpo"]["eval/accuracy"] > 0.6


def swapped(row):
  group = pairs.encode(row)
  return group._replace(completions=group.completions[::-1], labels=group.labels[::-1])


def same_twice(row):
  group = pairs.encode(row)
  return group._replace(completions=(group.completions[0],) * 2)


def with_margin(row):
  return pairs.encode(row)._replace(margin=0.5)


def long_pair(row):
  return Group((pairs.completion("abcd", "d" * 12), pairs.completion("abcd", "a" * 9)), (1.0, 0.0))


def as_example(row):
  return tiny.encode(row)


def alone(row):
  group = pairs.encode(row)
  return Group(group.completions[:1], group.labels[:1])


def data_with(encode, recipe=pairs.data):
  return functools.partial(_data_with, encode=encode, recipe=recipe)


def _data_with(tokenizer, *, encode, recipe):
  return dataclasses.replace(recipe(tokenizer), encode=encode)


KTO = objectives.kto()
BAD = {
  "swapped": (
    lambda: pairs.stage(data=data_with(swapped)),
    r"stage dpo: train\[0\]: expected the chosen completion before the rejected one",
  ),
  "same twice": (
    lambda: pairs.stage(data=data_with(same_twice)),
    r"stage dpo: train\[0\]: expected two different completions, found the same one twice",
  ),
  "margin": (
    lambda: pairs.stage(data=data_with(with_margin)),
    r"train\[0\]: margin: a preference objective does not read it, found 0.5",
  ),
  "longer than a row": (
    lambda: pairs.stage(data=data_with(long_pair)),
    r"stage dpo: train\[0\] has 33 tokens, a row holds 32",
  ),
  "examples": (
    lambda: pairs.stage(data=data_with(as_example)),
    r"stage dpo: train\[0\]: expected a Group of completions, found a Example",
  ),
  "one of a pair": (
    lambda: pairs.stage(data=data_with(alone)),
    r"train\[0\]: the loss 'sigmoid': expected a pair of completions, found one labelled",
  ),
  "pairs for kto": (
    lambda: pairs.stage(objective=KTO),
    r"train\[0\]: the loss 'kto': expected one labelled completion, found a pair",
  ),
  "kto without mismatched ones": (
    lambda: pairs.stage(objective=KTO, data=data_with(alone, pairs.unpaired)),
    r"train\[0\]: the loss 'kto': expected a mismatched completion behind",
  ),
  "held out for kto": (
    lambda: pairs.stage(objective=objectives.bco(), data=data_with(alone, pairs.unpaired)),
    r"held_out\[0\]: a held-out row: expected a pair of completions, found one labelled",
  ),
  "early stop": (
    lambda: pairs.stage(stop=(EarlyStop("eval/perplexity", rises=True),)),
    r"early stop: expected a metric among .*eval/accuracy.*, found 'eval/perplexity'",
  ),
  "reference": (
    lambda: pairs.stage(reference="disk"),
    "stage dpo: reference: expected online or cached, found 'disk'",
  ),
  "no reference to cache": (
    lambda: CACHED(objective=objectives.simpo()),
    "stage dpo: reference: the objective has none, expected online, found 'cached'",
  ),
  "groups are not cut": (
    lambda: pairs.stage(layout=Layout(4, 32, too_long="truncate")),
    "stage dpo: too_long: expected error or drop",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_before_anything_is_compiled_or_written(case, tmp_path, monkeypatch):
  make, expected = BAD[case]
  compiled = []
  monkeypatch.setattr(checks.preference, "compiled_step", lambda *_: compiled.append(1))
  with pytest.raises(ValueError) as caught:
    run(tmp_path / "runs", pairs.experiment(make()))
  message = str(caught.value)
  assert re.search(expected, message), message
  assert "\n" not in message and not compiled
  assert not (tmp_path / "runs").exists()


def swapped_later(row):
  return swapped(row) if row.get("number") == 30 else pairs.encode(row)


def test_a_bad_pair_further_on_stops_the_run(tmp_path):
  rows = [{**row, "number": i} for i, row in enumerate(tiny.words(200, 1))]
  unshuffled = Mixture({"words": MemorySource(rows, "train")}, seed=None)
  data = lambda tokenizer: dataclasses.replace(
    pairs.data(tokenizer), train=unshuffled, encode=swapped_later
  )
  with pytest.raises(ValueError, match=r"^stage dpo: train\[30\]: expected the chosen completion"):
    run(tmp_path, pairs.experiment(pairs.stage(data=data)))


def test_early_stop_on_held_out_accuracy(tmp_path, no_report):
  rule = EarlyStop("eval/accuracy", above=0.6)
  finished = run(tmp_path, pairs.experiment(pairs.stage(stop=(rule,))))
  assert finished.results["dpo"]["steps"] == 6
