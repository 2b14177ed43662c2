"""Entry point of `omnivlm-edge` and `python -m omnivlm_edge`."""

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    # Loading the commands takes a moment, in which Ctrl-C shall end the program and no more.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from .cli import main

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


if __name__ == "__main__":
    main()
