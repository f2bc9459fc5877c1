"""Text as it becomes certain: however tokens come, a client reads the same text."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from pt_jax.data.chat_templates import load_template
from pt_jax.rollout.rollouts import Output, SamplingParams, StopReason
from pt_jax.serve.choices import Choice, name
from pt_jax.serve.protocol import Ask
from pt_jax.serve.served import Served
from tests.serve.tiny import LENGTH, MODEL, TOKENIZER

END = 257
SERVED = Served(
  name="x",
  tokenizer=TOKENIZER,
  template=load_template("chatml"),
  vocab_size=MODEL.vocab_size,
  max_length=LENGTH,
  stop_tokens=(END,),
  created=0,
)
many = hypothesis.settings(deadline=None, max_examples=200, database=None, derandomize=True)


def ask(stops=(), logprobs=None):
  sampling = SamplingParams(max_tokens=90, stop_tokens=(END,), stop_strings=stops)
  return Ask(
    chat=False,
    prompts=((1,),),
    echoes=(),
    sampling=sampling,
    draw=True,
    n=1,
    seed=None,
    logprobs=logprobs,
    stream=False,
    include_usage=False,
  )


def outputs(tokens, cuts, stop):
  """The tokens in pieces, the last one with the reason."""
  edges = [0, *sorted({c for c in cuts if 0 < c < len(tokens)}), len(tokens)]
  for a, b in itertools.pairwise(edges):
    logprobs = tuple(-float(i) for i in range(a, b))
    yield Output(0, 0, tuple(tokens[a:b]), logprobs, "", stop if b == len(tokens) else None, 0)


def until(tokens, stops):
  """As the engine ends: with the token that completes a stop string."""
  for i in range(1, len(tokens) + 1):
    if any(s in TOKENIZER.decode(tokens[:i]) for s in stops):
      return tokens[:i], StopReason.STRING
  return tokens, StopReason.LENGTH


@many
@hypothesis.given(
  st.text("abé", min_size=1, max_size=30),
  st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
  st.lists(st.integers(1, 60), max_size=12),
)
def test_a_stop_string_is_never_shown(text, stops, cuts):
  tokens, stop = until(TOKENIZER.encode(text), stops)
  choice, shown = Choice(SERVED, ask(tuple(stops))), ""
  whole = TOKENIZER.decode(tokens)
  expected = whole[: min([whole.find(s) for s in stops if s in whole], default=len(whole))]
  for output in outputs(tokens, cuts, stop):
    delta = choice.push(output)
    shown += delta.text
    assert expected.startswith(shown)  # nothing that would have to be taken back
  assert shown == expected
  assert delta.finish == ("stop" if stop == StopReason.STRING else "length")


def test_the_token_that_ended_it_has_a_logprob_and_no_text():
  choice = Choice(SERVED, ask(logprobs=0))
  (delta,) = [choice.push(o) for o in outputs([0xC3, 0xA9, 98, END], [], StopReason.TOKEN)]
  assert (delta.text, delta.finish, choice.count) == ("éb", "stop", 4)
  assert [t.id for t in delta.tokens] == [0xC3, 0xA9, 98, END]
  assert [t.offset for t in delta.tokens] == [0, 0, 1, 2]


def test_half_a_character_at_the_end_is_shown_as_such():
  choice = Choice(SERVED, ask())
  texts = [choice.push(o).text for o in outputs([97, 0xC3], [1], StopReason.LENGTH)]
  assert texts == ["a", "\ufffd"]


@pytest.mark.parametrize(
  "token, expected",
  [(97, "a"), (0xC3, "bytes:\\xc3"), (END, "<|endoftext|>"), (271, "token_id:271")],
)
def test_names_of_tokens(token, expected):
  assert name(SERVED, token) == expected
