"""`asa plan`: will a config fit on machines that are not here, and how fast will it be? Arithmetic, no GPU, no torch.

Reading order: shape → flops → memory → machine → step_time → planning → report.
Of this machine, which is measured: calibration → gloo, rehearsal → made_up; both by measuring_ranks.
"""
