"""How OpenMP's threads wait for each other, decided before torch loads the runtime, which reads its variables once.

torch's CPU wheels carry GCC's runtime, libgomp. By default a thread of it spins up to 300,000 turns, milliseconds, at
every barrier before it sleeps. Where another process holds a core, the thread that the others wait for does not run,
and theirs spin through the time slices that it needs: rounds take many times as long (`python -m benchmarks.waiting`,
docs/waiting.json). The bound is about what putting a thread to sleep and waking it costs, tens of microseconds: whoever
spins for as long as sleeping would cost never spends more than twice the better of the two (Karlin et al. 1988,
"Competitive snoopy caching").
"""

from __future__ import annotations

import os
import sys

BOUNDED = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""The bound for GCC's runtime, and no spinning for LLVM's and Intel's, which a torch built otherwise may load: their
bound is in milliseconds, and one is too many."""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""With any of them the user has decided."""


def bound_spinning() -> None:
    """Bound the spinning of this process's OpenMP threads and of the processes it starts, unless the user has set one
    of `VARIABLES`.

    To be called before torch is imported: afterwards it does nothing, since the runtime would not notice.
    """
    if "torch" in sys.modules or any(name in os.environ for name in VARIABLES):
        return
    os.environ.update(BOUNDED)
