"""DeepSpeed's launcher, as `python -m deepspeed.launcher.launch`, without the words and variables that it logs.

DeepSpeed 0.19.8 logs every variable with NCCL in its name, and the whole command line of each rank, twice if it fails. Any of
them may hold a secret, and logs are read by others.
"""

import logging

_ENDED = " exits with return code"


class _WithoutWords(logging.Filter):
    """Warnings and errors pass; of a rank's command line only what became of it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if _ENDED in (said := record.getMessage()):
            record.msg, record.args = "a rank" + said[said.rindex(_ENDED) :], ()
        return record.levelno >= logging.WARNING


def main() -> None:
    """Start the ranks that the command line asks for, and wait for them."""
    from deepspeed.launcher import launch

    launch.logger.addFilter(_WithoutWords())
    launch.main()


if __name__ == "__main__":
    main()
