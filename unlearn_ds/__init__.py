"""unlearn-ds: make a pre-trained language model forget, on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
