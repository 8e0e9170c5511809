"""A process that works on a study without a model: a trial is a nap, and its value is its learning rate.

Arguments: the study's folder, the number of trials, the length of a nap in seconds.
"""

import sys
import time

from unlearn_ds.tune.options import TuneConfig
from unlearn_ds.tune.study import Study
from unlearn_ds.tune.workbench import Outcome


def main(folder: str, num_trials: str, nap_s: str) -> None:
    """Take trials until none is left."""
    study = Study(TuneConfig(base="base.yaml", output_dir=folder, num_trials=int(num_trials)), {"model": "m"})
    while (asked := study.next((1e-4, 1e-2), 0)) is not None:
        print(f"began {asked.number}", flush=True)
        time.sleep(float(nap_s))
        study.report(asked, 2, asked.options["learning_rate"])
        study.tell(asked, Outcome(value=asked.options["learning_rate"], updates=2, best_update=2))
        print(f"ended {asked.number}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
