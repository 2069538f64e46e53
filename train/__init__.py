"""Learn: data, cached encodings, the objective, the loop, checkpoints."""

import infer  # noqa: F401  which says what is amiss outside of the environment
