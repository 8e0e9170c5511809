"""From a request to the outcome: `unlearn-ds forget`."""
