"""Training: one loop for every package (`loop`), its configuration (`config`), and what a task is (`task`).

Import the submodules directly. `fsae.training.config` needs no torch, so a command line can show its help at once.
"""
