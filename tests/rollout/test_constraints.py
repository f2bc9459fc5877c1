"""Constrained output: masks against Python's `re` and the jsonschema library, on random walks."""

import json
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jsonschema
import numpy as np
import pytest

from pt_jax.data.tokenizers import ByteTokenizer
from pt_jax.rollout.constraints import Constraint, Grammars, allowed, json_schema, regex

quick = hypothesis.settings(deadline=None, max_examples=200, database=None, derandomize=True)
V = 300


class Pieces:
  """Bytes, and tokens that stand for several characters or for parts of some."""

  name = "pieces"
  merged = (b"ab", b"ba", b"aab", "éa".encode(), "é".encode()[1:] + b"b", b'{"', b'":', b"12")

  def token_bytes(self) -> list[bytes]:
    return [bytes([i]) for i in range(256)] + list(self.merged) + [b""]


STOP = 256 + len(Pieces.merged)


@pytest.fixture(scope="module")
def grammars():
  return Grammars(Pieces(), V)


def tokens_of(bits):
  return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))


def walk(matcher, rng, longest=80):
  """A random completion: its bytes, and whether it came to a stop token."""
  pieces, text = Pieces().token_bytes(), b""
  for _ in range(longest):
    token = int(rng.choice(tokens_of(matcher.mask())))
    matcher.advance(token)
    if token == STOP:
      return text, True
    text += pieces[token]
  return text, False


def follow(matcher, text):
  """Whether the matcher takes these bytes, one after the other, and lets the completion end."""
  for byte in text:
    if byte not in tokens_of(matcher.mask()):
      return False
    matcher.advance(byte)
  return STOP in tokens_of(matcher.mask())


def expressions():
  """Regular expressions over a, b and é whose meaning is the same to Python and to Rust."""
  leaf = st.sampled_from(["a", "b", "é", "ab", "[ab]", "[^a]", "[a-b]", "(?:é|b)", r"\."])
  extend = lambda inner: st.one_of(
    st.builds("{}{}".format, inner, inner),
    st.builds("(?:{}|{})".format, inner, inner),
    st.builds("(?:{}){}".format, inner, st.sampled_from(["?", "*", "+", "{2}", "{1,3}", "{0,2}"])),
  )
  return st.recursive(leaf, extend, max_leaves=6)


@quick
@hypothesis.given(expressions(), st.integers(0, 2**32 - 1), st.text("abé.", max_size=8))
def test_masks_are_those_of_pythons_re(grammars, pattern, seed, text):
  """What is drawn matches; any text is taken if, and only if, it matches."""
  matcher = grammars.matcher(regex(pattern), [STOP])
  drawn, stopped = walk(matcher.fork(), np.random.default_rng(seed))
  if stopped:
    assert re.fullmatch(pattern, drawn.decode(), re.DOTALL)
    assert follow(matcher.fork(), drawn)
  assert follow(matcher, text.encode()) == bool(re.fullmatch(pattern, text))


@quick
@hypothesis.given(st.data())
def test_every_text_that_matches_can_be_drawn(grammars, data):
  pattern = data.draw(expressions())
  text = data.draw(st.from_regex(f"\\A(?:{pattern})\\Z", alphabet="abé.xy")).encode()
  assert follow(grammars.matcher(regex(pattern), [STOP]), text)


SCHEMAS = {
  "object": {
    "type": "object",
    "properties": {
      "name": {"type": "string", "maxLength": 5},
      "age": {"type": "integer", "minimum": 0, "maximum": 130},
      "kind": {"enum": ["a", "é", 3]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
  },
  "array": {
    "type": "array",
    "items": {"$ref": "#/$defs/x"},
    "minItems": 1,
    "maxItems": 3,
    "$defs": {"x": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}},
  },
  "pattern": {"type": "string", "pattern": "^[ab]{2,4}$"},
}
VALUES = {
  "object": ({"name": "ab", "age": 130, "kind": "é"}, {"name": "ab", "age": 131}),
  "array": ([True, None], []),
  "pattern": ("abab", "abc"),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_samples_of_a_schema_validate(grammars, name):
  schema, rng = SCHEMAS[name], np.random.default_rng(0)
  matcher, ended = grammars.matcher(json_schema(schema), [STOP]), set()
  for _ in range(40):
    text, stopped = walk(matcher.fork(), rng)
    if stopped:
      jsonschema.validate(json.loads(text), schema)
      ended.add(text)
  assert len(ended) > 4
  fits, does_not = VALUES[name]
  plain = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
  assert follow(matcher.fork(), plain(fits)) and not follow(matcher.fork(), plain(does_not))


def test_a_completed_text_can_only_stop(grammars):
  matcher = grammars.matcher(regex("a"), [STOP, 7])
  assert tokens_of(matcher.mask()).tolist() == [ord("a")]
  matcher.advance(ord("a"))
  assert tokens_of(matcher.mask()).tolist() == [7, STOP]
  with pytest.raises(ValueError, match="token 98 cannot come next"):
    matcher.fork().advance(ord("b"))
  matcher.advance(STOP)


def test_draws_are_the_renormalised_distribution(grammars):
  """Of 20,000 first tokens and their successors; what the mask forbids never comes."""
  from scipy.stats import chisquare

  rng = np.random.default_rng(0)
  logits = rng.normal(size=(256, V)).astype(np.float32) * 2
  matcher = grammars.matcher(regex("(ab|ba|aab)+b?|é"), [STOP])
  mask = np.asarray(allowed(matcher.mask()[None], V))[0]
  p = np.where(mask, np.exp(logits[0]), 0)
  p /= p.sum()
  masked = np.where(mask, logits[0], -np.inf)
  drawn = np.asarray(jax.random.categorical(jax.random.key(0), masked, shape=(20_000,)))
  counts = np.bincount(drawn, minlength=V)
  assert counts[~mask].sum() == 0 and mask.sum() >= 5
  assert chisquare(counts[mask], 20_000 * p[mask]).pvalue > 1e-3


@pytest.mark.parametrize(
  "constraint, message",
  [
    (regex("a("), "constraint: regex: .*unclosed group"),
    (regex("(?=a)a"), "constraint: regex: .*look-around"),
    (json_schema({"type": "nope"}), "constraint: json_schema: Invalid type: nope"),
    (json_schema({"$ref": "http://x"}), "constraint: json_schema: .*does not fetch"),
    (json_schema({"type": "array", "uniqueItems": True}), "json_schema: .*uniqueItems"),
    (json_schema({"type": "string", "pattern": "(a"}), "constraint: json_schema: "),
  ],
)
def test_forms_that_cannot_be_compiled(grammars, constraint, message):
  with pytest.raises(ValueError, match=message) as caught:
    grammars.matcher(constraint, [STOP])
  assert "\n" not in str(caught.value)


def test_what_else_is_refused(grammars):
  with pytest.raises(ValueError, match="expected stop tokens below 300, found"):
    grammars.matcher(regex("a"), [])
  with pytest.raises(ValueError, match="expected 1 to 16384 characters of regex, found 0"):
    regex("")
  with pytest.raises(ValueError, match="kind: expected regex or json_schema, found 'lark'"):
    Constraint("lark", "x")


def test_the_byte_tokenizer_ends_its_turn():
  tokenizer = ByteTokenizer()
  matcher = Grammars(tokenizer, 512).matcher(regex("<think>x"), [tokenizer.token_id("<|im_end|>")])
  think = tokenizer.token_id("<think>")
  assert tokens_of(matcher.mask()).tolist() == [ord("<"), think]
  for token in (think, ord("x")):
    matcher.advance(token)
  assert tokens_of(matcher.mask()).tolist() == [tokenizer.token_id("<|im_end|>")]
