"""How the program of a run ends: with which exit code, and with which one line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from gkd_hf.errors import NOT_FINITE, InputError, refused
from gkd_hf.training.checkpoints import is_full_disk
from gkd_hf.training.process_group import end_process_group, is_lost_peer, leave, several, tell_lost_peer
from gkd_hf.training.sigterm import ENDED, Preempted, sigterm_came, sigterm_ended
from gkd_hf.training.stream_trainer import NonFiniteLossError


def exit_code(run: Callable[[], Any]) -> int:
    """Call ``run`` and return the exit code of its program.

    0 also after SIGTERM, 2 for wrong input, 3 where the loss did not stay finite, 130 after Ctrl-C, 1 where another
    process of the run is gone: each with a line on stderr. Any other exception is a mistake of this library and keeps
    its traceback. One of several processes does not return from anything but success: it ends here, since the
    interpreter's own end can wait for peers that are gone.
    """
    try:
        run()
        end_process_group()
        return 0
    except Preempted:
        code = 0
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on from the last checkpoint, if there was one yet")
        code = 130
    except NonFiniteLossError as error:
        refused(error)
        code = NOT_FINITE
    except InputError as error:
        code = refused(error)
    except Exception as error:
        # The launcher, which has seen the first failure, may end the survivors while they wait to tell theirs.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if is_full_disk(error):
            code = refused(InputError(f"{error}: make room, then run the same command again: nothing is lost"))
        elif is_lost_peer(error):
            code = tell_lost_peer(error, at_once=sigterm_came())
        elif sigterm_ended() and isinstance(error, RuntimeError):
            # The signal went to other child processes too, and who waits for one says so.
            _say(ENDED)
            code = 0
        elif several():
            traceback.print_exc()
            code = 1
        else:
            raise
    if several():
        leave(code)
    return code


def _say(line: str) -> None:
    """The main process speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
