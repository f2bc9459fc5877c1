"""What the engine counts of itself, and what a step of training shows of it."""

import dataclasses


@dataclasses.dataclass
class EngineFigures:
  """Counters since the engine was made; `since` makes rates of them."""

  generated: int = 0  # tokens drawn
  prefilled: int = 0  # prompt tokens computed, and tokens computed again after a preemption
  prefix_hits: int = 0  # tokens that were not computed, since their pages were there
  launches: int = 0
  prefills: int = 0
  preemptions: int = 0
  compilations: int = 0  # programs of different shapes that were asked for
  seconds: float = 0.0  # in `step`
  finished: int = 0  # samples
  queue_seconds: float = 0.0  # from submission to a slot, summed over finished samples
  first_token_seconds: float = 0.0  # from submission to the first token
  decode_seconds: float = 0.0  # from the first token to the last
  decoded: int = 0  # tokens behind the first, of finished samples
  verified: int = 0  # steps of samples that proposals were read in
  speculated: int = 0  # tokens drawn in these
  proposed: int = 0  # tokens
  accepted: int = 0  # of these
  pages: int = 0  # that there are
  pages_held: int = 0  # by samples now
  pages_peak: int = 0  # most that were held at once

  def copy(self) -> "EngineFigures":
    """As they are now."""
    return dataclasses.replace(self)

  def since(self, before: "EngineFigures") -> dict[str, float]:
    """Rates between two moments: tokens/s, share of prompt tokens found in pages, means over the
    samples that finished (seconds; TPOT per token), peak page use. With speculation also the share
    of proposals that were accepted, and tokens per step of a sample."""
    change = lambda name: getattr(self, name) - getattr(before, name)
    samples, seen = max(change("finished"), 1), change("prefilled") + change("prefix_hits")
    speculation = {
      "accepted": change("accepted") / max(change("proposed"), 1),
      "tokens_per_step": change("speculated") / max(change("verified"), 1),
    }
    return {
      "tokens_per_second": change("generated") / max(change("seconds"), 1e-9),
      "prefix_hits": change("prefix_hits") / max(seen, 1),
      "ttft_seconds": change("first_token_seconds") / samples,
      "tpot_seconds": change("decode_seconds") / max(change("decoded"), 1),
      "queue_seconds": change("queue_seconds") / samples,
      "page_use": self.pages_peak / max(self.pages, 1),
      "preemptions": float(change("preemptions")),
      "compilations": float(self.compilations),
      **(speculation if self.verified else {}),
    }
