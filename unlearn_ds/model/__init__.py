"""A causal LM from its files into ZeRO partitions: weights, layers, attention, adapters and the loss head."""
