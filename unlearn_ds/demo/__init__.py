"""The whole story on one machine, offline: `unlearn-ds demo`."""
