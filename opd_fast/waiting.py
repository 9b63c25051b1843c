"""How long OpenMP's threads spin before they sleep; it is set before torch loads their runtime, which reads it once.

torch's CPU wheels contain GCC's runtime, libgomp. By default its threads spin for up to 300,000 turns (milliseconds) at
every barrier before they sleep. When another process holds a core, one thread does not run, and the others spin in the
time slices that it needs: rounds take many times as long (`python -m benchmarks.waiting`, docs/waiting.json). The bound
is close to the cost of putting a thread to sleep and waking it, tens of microseconds: a thread that spins for as long
as sleeping costs never spends more than twice the cheaper choice (Karlin et al. 1988, "Competitive snoopy caching").
"""

from __future__ import annotations

import os
import sys

BOUNDED = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""The turns of GCC's runtime. LLVM's and Intel's, which other builds of torch load, do not spin at all: they count
milliseconds, and one is too long."""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""A user who sets one of them has decided."""


def bound_spinning() -> None:
    """Bound the spinning of OpenMP's threads in this process and those it starts, unless `VARIABLES` say otherwise.

    Once torch is imported, this does nothing, because the runtime has read its variables.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ.update(BOUNDED)
