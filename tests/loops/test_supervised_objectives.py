"""Supervised stages with a reference: near their start, resumed exactly, stopped by their KL."""

import pytest

from pt_jax import metrics
from pt_jax.experiment import EarlyStop
from pt_jax.loops import pipeline, supervised
from pt_jax.losses.supervised import ReferenceKl, SupervisedObjective
from tests.loops import tiny
from tests.loops.runs import Interrupted, bits, interrupted_at, logged, run

PSFT = SupervisedObjective(kl=ReferenceKl(2.0))
MEASURED = SupervisedObjective(kl=ReferenceKl(0.0))  # SFT that logs how far it goes
# Checkpoints are at 4, 8 and 12: between two refreshes of the reference, in the state.
CLIPPED = SupervisedObjective("clipped", clip=0.2, kl=ReferenceKl(0.1, "k2"), refresh_every=3)


@pytest.fixture(autouse=True, scope="module")
def no_report():
  """Reports have tests of their own; drawing one takes longer than these runs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline.report, "write_report", lambda *_: None)
    yield


def experiment(objective, **changes):
  stage = {"objective": objective, "sample_every": 0, "sampling": None} | changes
  return tiny.experiment(tiny.stage(**stage))


def rows(finished, name):
  """(step, value) of a metric."""
  every = metrics.read_jsonl(finished.folder / "metrics.jsonl")
  return [(row["step"], row[name]) for row in every if name in row]


@pytest.fixture(scope="module", params=[PSFT, CLIPPED], ids=["psft", "clipped"])
def whole(request, tmp_path_factory):
  """A run that nothing interrupted, and its objective."""
  objective = request.param
  return run(tmp_path_factory.mktemp("whole"), experiment(objective)), objective


def test_interrupted_and_resumed_is_bitwise_the_same(whole, tmp_path, monkeypatch):
  finished, objective = whole
  for step in (6, 4):  # two steps behind a checkpoint, one before the next
    with monkeypatch.context() as patch:
      interrupted_at(step, patch)
      with pytest.raises(Interrupted):
        run(tmp_path, experiment(objective))
  resumed = run(tmp_path, experiment(objective))
  assert bits(resumed.params) == bits(finished.params)
  assert logged(resumed.folder) == logged(finished.folder)


def test_what_is_logged_has_the_names_that_early_stops_may_watch(whole):
  finished, objective = whole
  every = metrics.read_jsonl(finished.folder / "metrics.jsonl")
  found = {frozenset(row.keys() - {"stage", "step"}) for row in every}
  names = supervised.step_metrics(objective), supervised.evaluation_metrics(objective)
  assert found == {frozenset(n) for n in names}


def test_psft_stays_nearer_to_its_start_than_sft(whole, tmp_path):
  finished, objective = whole
  if objective is not PSFT:
    ratio = dict(rows(finished, "loss/ratio"))
    assert all(abs(ratio[step] - 1) < 1e-5 for step in (1, 4, 7, 10))  # refreshed just before
    assert all(abs(ratio[step] - 1) > 1e-3 for step in (3, 6, 9, 12))
    return
  free = run(tmp_path, experiment(MEASURED))
  near, far = rows(finished, "eval/kl"), rows(free, "eval/kl")
  assert near[0] == (0, 0) and far[0] == (0, 0), "it starts from its reference"
  assert [step for step, _ in near] == [step for step, _ in far] == [0, 6, 12]
  assert 0 < near[-1][1] < 0.5 * far[-1][1]
  nats = [rows(finished, "eval/nats_per_token")[i][1] for i in (0, -1)]
  assert nats[-1] < nats[0], "and it still learns"


def test_its_kl_may_stop_it(tmp_path):
  rule = EarlyStop("loss/kl", above=0.01, patience=2)
  stopped = run(tmp_path, experiment(MEASURED, stop=(rule,)))
  seen = rows(stopped, "loss/kl")
  assert len(seen) < 12
  over = [step for step, kl in seen if kl > 0.01]
  # The second one is seen when the next step has been dispatched.
  assert over[:2] == [over[0], over[0] + 1] and seen[-1][0] == over[1] + 1


@pytest.mark.parametrize("metric", ["loss/kl", "eval/ratio"])
def test_a_metric_that_the_objective_does_not_log_is_named(metric, tmp_path):
  plain = experiment(SupervisedObjective(), stop=(EarlyStop(metric, above=0.1),))
  with pytest.raises(ValueError, match=f"found '{metric}'"):
    run(tmp_path, plain)
