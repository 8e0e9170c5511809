"""One run's parts: built from its options, its folder and records, an update, guards, and the exported model."""
