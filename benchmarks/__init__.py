"""What zmqsched costs on this machine, side by side with the standard library's ProcessPoolExecutor.

``python -m benchmarks`` (or ``make bench``) prints one screen: medians, ratios, and the goal beside each. Nothing here
fails on a slow machine: a goal is a statement to look at, not a test.
"""
