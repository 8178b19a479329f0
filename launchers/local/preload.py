"""What the fork server imports before it forks ranks, and its last step before it takes care of Ctrl-C itself.

Until then it ignores Ctrl-C, as it was started: a terminal sends it to every process of the command, and an import that
it interrupts ends with a traceback.
"""

import signal

import trimaran.launchers.worker.run  # noqa: F401 - with torch, for all ranks

# The fork server keeps this for its children, and ignores Ctrl-C itself from here on.
signal.signal(signal.SIGINT, signal.default_int_handler)
