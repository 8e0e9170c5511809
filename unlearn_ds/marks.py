"""Names of the parts of an update in a profiler's trace."""

FORWARD = "unlearn_ds.forward"
BACKWARD = "unlearn_ds.backward"
LOSS = "unlearn_ds.loss"
OPTIMIZER = "unlearn_ds.optimizer"
REFERENCE = "unlearn_ds.reference"
