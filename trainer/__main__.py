"""`python -m trainer`, and its commands `evaluate` and `inspect`."""

import os
import signal
import sys

from trainer.stop import StopRequest


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
    # After the handlers, for these imports take seconds; torch comes when the settings are known to be good.
    from trainer.config import ConfigError, parse_config

    try:
        config = parse_config()
    except ConfigError as error:
        return _failed(error, 2)
    if stop():
        return stop.exit_code

    from trainer.agent import NonFiniteGradientError
    from trainer.training import LostRankError, StartError, train

    try:
        return train(config, stop)
    except ConfigError as error:
        return _failed(error, 2)
    except (StartError, LostRankError, NonFiniteGradientError) as error:
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
        # As in `inspect CHECKPOINT | head`. What is still buffered must not fail once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _failed(error: Exception, code: int) -> int:
    from trainer.display import say

    say(f"python -m trainer: error: {error}", to_stderr=True)
    return code


def _let_go_of_what_cannot_be_written() -> None:
    """On a full disk, say: Python would try again at the exit, and make an exit code of its own of it."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a closed one is None
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    code = main()
    _let_go_of_what_cannot_be_written()
    sys.exit(code)
