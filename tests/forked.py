"""Several processes of one program, forked once all that it needs is imported.

It takes the command line of ``accelerate launch`` and gives the processes what that gives them. An
import of torch and transformers in each would take ten seconds of a core, so this is for tests of
what the processes do together; how they are started and ended is accelerate's and torch's own.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

from accelerate.commands import launch

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Start them and wait for all of them; the exit code of the first that failed."""
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args())
    os.environ.update(launch.prepare_multi_gpu_env(args))
    count = int(args.num_processes)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": args.main_process_port}
    for name, value in {**place, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}.items():
        os.environ[name] = str(value)
    sys.argv = [args.training_script, *args.training_script_args]
    import_all()
    parent, children = os.getpid(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            # None outlives a test that gives up.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                return 1
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            runpy.run_path(sys.argv[0], run_name="__main__")
            return 0
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((code for code in codes if code), 0)


def import_all() -> None:
    """What the trainer imports, and what it needs of transformers for the tiny encoder."""
    from transformers import BertModel, PreTrainedTokenizerFast  # noqa: F401

    from tests.training_runs import load_program

    load_program()


if __name__ == "__main__":
    sys.exit(main())
