"""The commands that measure a model: `evaluate` with its attempts to bring things back, and `report`."""
