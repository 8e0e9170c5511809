"""A search for the settings of an unlearning: `unlearn-ds tune`."""
