"""`trak-fast bench`: measures every random projection that a machine has, side by side.

candidates.py says what can be measured, worker.py measures one candidate in a process of its own, runner.py goes
through the grid, figures.py computes what follows from the measurements, page.py shows them. `trak-fast plan` is
plan.py.
"""
