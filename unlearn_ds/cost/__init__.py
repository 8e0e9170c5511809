"""Whether a run fits and how long it takes: memory, FLOPs and traffic, before it is started."""
