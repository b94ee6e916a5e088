"""`python -m trainer`."""

import sys

from trainer.config import ConfigError, parse_config


def main() -> int:
    try:
        config = parse_config()
    except ConfigError as error:
        return _failed(error, 2)
    # After the settings are known to be good: torch takes seconds to import.
    from trainer.agent import NonFiniteGradientError
    from trainer.training import train

    try:
        return train(config)
    except ConfigError as error:
        return _failed(error, 2)
    except (OSError, NonFiniteGradientError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return 130


def _failed(error: Exception, code: int) -> int:
    print(f"python -m trainer: error: {error}", file=sys.stderr)
    return code


sys.exit(main())
