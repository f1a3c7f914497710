"""UDASA's single-device mathematics: numbers and tensors in and out; no collectives, no files, no processes.

Shape suffixes used throughout: P prompts, or their pairs (one each at most), 2 a pair's chosen and rejected response,
N responses of a prompt, S responses of any prompts, T tokens, K uncertainties that are measured, E thresholds of Δu,
L labels of a classifier, D embedding size.
"""
