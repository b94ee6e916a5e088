"""`python -m trainer`, and its commands `evaluate` and `inspect`."""

import os
import signal
import sys

from trainer.stop import StopRequest


def command() -> int:
    """`main()` as a program, with an end that nothing can spoil."""
    try:
        code = main()
    except ModuleNotFoundError as error:
        if error.name not in ("gymnasium", "numpy", "rich"):
            raise
        print(
            f"ppo-train: error: {error.name} is missing: pip install 'ppo-gradient-exporter[trainer]'", file=sys.stderr
        )
        code = 1
    _drop_unwritable_output()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Rarely, a thread of gloo that still releases a tensor while Python shuts down aborts the process, and torchrun
        # reports a failed rank: https://github.com/pytorch/pytorch/issues/190489. All is written by now.
        os._exit(code)
    return code


def main() -> int:
    with StopRequest().listening() as stop:
        try:
            match sys.argv[1:]:
                case ["evaluate" | "inspect" as command, *arguments]:
                    return _examine(command, arguments, stop)
                case _:
                    return _train(stop)
        except KeyboardInterrupt:
            return stop.exit_code


def _train(stop: StopRequest) -> int:
    # Import after installing the signal handlers: this takes seconds. Import torch last, when the settings are valid.
    from trainer.config import ConfigError, StartError
    from trainer.parsing import parse_config

    try:
        config, telemetry = parse_config()
    except ConfigError as error:
        return _failed(error, 2)
    if stop():
        return stop.exit_code

    from trainer.agent import NonFiniteGradientError
    from trainer.environments import UnsupportedEnvironment
    from trainer.training import LostRankError, train

    try:
        return train(config, telemetry, stop)
    except ConfigError as error:
        return _failed(error, 2)
    except (StartError, LostRankError, NonFiniteGradientError, UnsupportedEnvironment) as error:
        return _failed(error, 1)


def _examine(command: str, arguments: list[str], stop: StopRequest) -> int:
    from trainer.config import ConfigError
    from trainer.evaluation import CheckpointError, evaluate, inspect

    try:
        return evaluate(arguments, stop) if command == "evaluate" else inspect(arguments)
    except ConfigError as error:
        return _failed(error, 2)
    except CheckpointError as error:
        return _failed(error, 1)
    except BrokenPipeError:
        # As in `inspect CHECKPOINT | head`. Buffered output must not fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _failed(error: Exception, code: int) -> int:
    from trainer.display import say

    say(f"python -m trainer: error: {error}", to_stderr=True)
    return code


def _drop_unwritable_output() -> None:
    """Python would write it again at the exit, for example on a full disk, and change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a closed one is None
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(command())
