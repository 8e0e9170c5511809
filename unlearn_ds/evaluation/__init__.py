"""From per-token statistics to perplexity, accuracy, membership inference, a verdict and a report."""
