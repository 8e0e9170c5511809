"""What makes many processes one run: ranks, launchers, signals, and the watch over ranks that die or stand still."""
