"""asa-dist: distributed training of language models that align themselves."""

__version__ = "0.1.0"
