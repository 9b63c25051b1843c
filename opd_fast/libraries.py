"""The libraries underneath, as a command line wants them: silent unless something is wrong."""

from __future__ import annotations

import os


def quiet() -> None:
    """Switch off progress bars and advice of transformers, diffusers and the hub. Call it before models are loaded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers.utils.logging
    import transformers.utils.logging

    for module in (diffusers.utils.logging, transformers.utils.logging):
        module.set_verbosity_error()
        module.disable_progress_bar()
