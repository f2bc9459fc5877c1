"""Diversity, leakage and early stopping, by cases worked by hand."""

import math

import numpy as np
import pytest

from pt_jax.data.tokenizers import ByteTokenizer
from pt_jax.experiment import EarlyStop
from pt_jax.loops import diagnostics
from pt_jax.loops.diagnostics import EarlyStopping
from pt_jax.rollout.rollouts import Rollouts, StopReason

TOKENIZER = ByteTokenizer()
END = TOKENIZER.token_id("<|endoftext|>")


def tokens(text, *, end=False):
  return TOKENIZER.encode(text) + [END] * end


@pytest.mark.parametrize(
  "text, expected",
  [
    ("<think>3 + 4 is 7</think>\nThe answer is 7.", "<think>0 + 0 w 0</think>\nw 0."),
    ("Paris", "w"),
    ("It's  a\tword", "w"),
    ("1,234.5 or 12%", "0 w 0%"),
    ("- one\n- two words", "- w\n- w"),
    ("über 3 äpfel", "w 0 w"),
    ("3 < 4 and 5 > 2", "0 < 0 w 0 > 0"),  # no tag
    ("", ""),
  ],
)
def test_the_format_of_a_text(text, expected):
  assert diagnostics.format_of(text) == expected


def test_distinct_ngrams_are_counted_over_all_sequences():
  # unigrams 1 2 1 | 2 3: 3 of 5; bigrams 12 21 | 23: 3 of 3
  assert diagnostics.distinct([[1, 2, 1], [2, 3]], 1) == 3 / 5
  assert diagnostics.distinct([[1, 2, 1], [2, 3]], 2) == 1.0
  assert diagnostics.distinct([[1, 1, 1, 1]], 2) == 1 / 3
  assert diagnostics.distinct([[1]], 2) == 0.0


@pytest.mark.parametrize(
  "completion, stop, leaks",
  [
    (tokens("fine", end=True), StopReason.TOKEN, False),
    (tokens("fine"), StopReason.LENGTH, False),
    (tokens("a <think>b</think> <answer>1</answer>"), StopReason.LENGTH, False),  # markup is meant
    (tokens("x < 3 |> y"), StopReason.LENGTH, False),
    (tokens("mid", end=True) + tokens("more"), StopReason.LENGTH, True),  # the token itself
    (tokens("more", end=True), StopReason.LENGTH, True),  # it did not end the completion
    (tokens("a<|im_start|>user"), StopReason.LENGTH, True),  # spelled out
    (tokens("a<|eot_id|>"), StopReason.LENGTH, True),  # of another template
    (tokens("<end_of_turn>"), StopReason.LENGTH, True),
    (tokens("[INST] hello [/INST]"), StopReason.LENGTH, True),
  ],
)
def test_template_leakage(completion, stop, leaks):
  assert diagnostics.leaks_template(completion, stop, TOKENIZER) == leaks


def test_sample_metrics_by_hand():
  completions = [tokens("ab", end=True), tokens("ab", end=True), tokens("7"), tokens("<|im_end|>")]
  stops = [StopReason.TOKEN, StopReason.TOKEN, StopReason.LENGTH, StopReason.STRING]
  found = diagnostics.sample_metrics(completions, stops, TOKENIZER)
  assert tuple(found) == diagnostics.SAMPLE_METRICS
  assert found["samples/distinct_outputs"] == 3 / 4
  # w and the end token twice; 0; the spelled-out tag, which is kept as it is
  assert found["samples/format_diversity"] == 3 / 4
  assert found["samples/template_leakage"] == 1 / 4
  assert found["samples/ended"] == 3 / 4
  assert found["samples/length"] == (3 + 3 + 1 + 10) / 4
  letters = {*b"ab", END, *b"7", *b"<|im_end|>"}
  assert found["samples/distinct_1"] == len(letters) / 17
  assert found["samples/distinct_2"] == (2 + 9) / (2 + 2 + 0 + 9)


def test_completions_are_what_follows_the_prompt():
  rollouts = Rollouts(
    tokens=np.array([[1, 2, 3, 0], [4, 5, 6, 7]]),
    prompt_length=np.array([1, 3]),
    length=np.array([3, 4]),
    logprobs=np.zeros((2, 4)),
    version=np.zeros((2, 4)),
    stop=np.zeros(2),
    forced=np.zeros((2, 4), bool),
  )
  assert diagnostics.completions_of(rollouts) == [[2, 3], [7]]


def test_perplexity_does_not_overflow():
  assert diagnostics.perplexity(math.log(8)) == pytest.approx(8)
  assert diagnostics.perplexity(1e6) == math.exp(700)


def steps_until_stop(rule, values):
  """The step of the logging that stops, None if none does."""
  stopping = EarlyStopping([rule])
  for step, value in enumerate(values, start=1):
    stopping.update(step, {"x": value, "other": 1e9})
    stopping.update(step, {"other": -1e9})  # a logging without the metric counts for nothing
    if stopping.reason:
      return step
  return None


@pytest.mark.parametrize(
  "rule, values, expected",
  [
    (EarlyStop("x", above=2), [1, 2, 3], 3),
    (EarlyStop("x", below=2), [3, 2, 1], 3),
    (EarlyStop("x", below=1, above=2), [1, 2, 1.5], None),
    (EarlyStop("x", above=2, patience=2), [3, 1, 3, 3], 4),
    (EarlyStop("x", rises=True), [3, 2, 2, 2.5], 4),
    (EarlyStop("x", rises=True, patience=2), [3, 2, 2.5, 1, 1.5, 1.2], 6),
    (EarlyStop("x", rises=True, patience=3), [1, 2, 3, 0.5, 1, 2], None),
  ],
)
def test_early_stop(rule, values, expected):
  assert steps_until_stop(rule, values) == expected


def test_the_reason_says_which_metric_and_bound():
  stopping = EarlyStopping([EarlyStop("a", above=9), EarlyStop("loss/entropy", below=0.5)])
  stopping.update(7, {"a": 1, "loss/entropy": 0.25})
  assert stopping.reason == "step 7: loss/entropy is 0.25, below 0.5, once"


def test_early_stop_goes_on_from_its_state():
  rules = [EarlyStop("x", rises=True, patience=2), EarlyStop("x", above=4, patience=2)]
  for cut in range(6):
    whole, first = EarlyStopping(rules), EarlyStopping(rules)
    values = [3, 2, 2.5, 1, 5, 6]
    for step, value in enumerate(values):
      if step == cut:
        first = EarlyStopping(rules, first.state())
      whole.update(step, {"x": value})
      first.update(step, {"x": value})
    assert first.state() == whole.state()
    assert whole.reason == "step 5: x is 6, risen over 1, 2 times in a row"


@pytest.mark.parametrize("fields", [{}, {"above": 1.0, "patience": 0}])
def test_a_rule_that_can_never_stop_is_an_error(fields):
  with pytest.raises(ValueError, match="early stop on x"):
    EarlyStop("x", **fields)
