"""ASA-LLM's single-device mathematics: tensors in, tensors out; no collectives, no files, no processes.

Shape suffixes used throughout: R rows, T tokens of a row, N = R·T tokens of a micro-batch, H hidden size, V vocabulary,
P groups (prompts), G responses per group, S = P·G responses, C claims, D embedding size, M principles.
"""
