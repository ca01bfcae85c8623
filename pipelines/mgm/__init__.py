"""MGM (Mini-Gemini) as a transformers 5 model: configuration, modelling, processing and conversion.

Importing this package is cheap. `register()` (or importing `pipelines.mgm.modeling`) makes `AutoConfig`,
`AutoModelForImageTextToText`, `AutoImageProcessor` and `AutoProcessor` know the model type `mgm`.
"""

from __future__ import annotations


def register() -> None:
    """Register MGM with transformers' Auto classes. Idempotent; imports torch and transformers."""
    from pipelines.mgm import modeling  # noqa: F401  (the modules register themselves on import)
