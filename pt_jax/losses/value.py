"""What a critic minimises."""

import chex
import jax
import jax.numpy as jnp


def value_loss(
  values: jax.Array,
  returns: jax.Array,
  old_values: jax.Array,
  mask: jax.Array,
  *,
  clip: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """0.5 max((v - R)^2, (v_old + clip(v - v_old, -c, c) - R)^2) of each token.

  The gradient by v is v - R, but 0 where v has left v_old by more than c towards R, the clipped
  term being the larger one.

  Args:
    values: [B, S] float32, the critic's estimate before the token at the position was chosen.
    returns: [B, S] float32, R.
    old_values: [B, S] float32, of the critic before the first update on this batch.
    mask: [B, S] float32, 0 where the token was not chosen by the policy; nothing there is read.
    clip: c, in units of reward; None: the plain squared error.

  Returns:
    loss [B, S], 0 outside the mask and not weighted by it, and metrics of the same shape, to be
    reduced by `token_mean`: `value`, `bias` = v - R, `error` = (v - R)^2, and `clip_fraction`.

  Source: the code of arXiv 1707.06347 (openai/baselines); arXiv 2006.05990, decision C13.
  """
  inputs = [values, returns, old_values, mask]
  chex.assert_rank(inputs, 2)
  chex.assert_equal_shape(inputs)
  chex.assert_type(inputs, jnp.float32)
  values, returns, old_values = (jnp.where(mask > 0, x, 0) for x in inputs[:3])
  error = jnp.square(values - returns)
  loss, clipped = 0.5 * error, jnp.zeros_like(error)
  if clip is not None:
    moved = values - old_values
    # Inside the bounds exactly `values`: rounding must not count as a clip.
    near = jnp.where(jnp.abs(moved) > clip, old_values + jnp.sign(moved) * clip, values)
    other = jnp.square(near - returns)
    loss, clipped = 0.5 * jnp.maximum(error, other), (other > error).astype(jnp.float32)
  metrics = {"value": values, "bias": values - returns, "error": error, "clip_fraction": clipped}
  return loss, jax.lax.stop_gradient(metrics)
