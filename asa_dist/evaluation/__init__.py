"""What a checkpoint is worth: held-out perplexity, rewards, known truth, lm-eval tasks; and its export.

One process, on the CPU or one GPU, whatever ranks wrote the checkpoint; it needs neither DeepSpeed nor Ray.
"""
