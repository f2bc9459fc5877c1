"""The rollout engine behind HTTP, in the shapes of OpenAI's API.

`protocol` reads requests and `responses` writes answers; `worker` has the one thread that owns JAX
and steps the engine; `app` is what stands between them and the network. `launch.serve` starts it.
"""
