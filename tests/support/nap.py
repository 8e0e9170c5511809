"""A rank that says how it was started and then sleeps: NAP seconds, by default none."""

import json
import os
import sys
import time
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Arguments: any. Prints them, with the variables that NAMES lists, as one line of JSON."""
    variables = {name: os.environ.get(name) for name in os.environ.get("NAMES", "").split()}
    print(
        "NAP " + json.dumps({"rank": os.environ.get("RANK"), "words": list(argv), "variables": variables}), flush=True
    )
    time.sleep(float(os.environ.get("NAP", "0")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
