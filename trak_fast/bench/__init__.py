"""`trak-fast bench`: measures every random projection that a machine has, side by side.

candidates.py says what can be measured, settings.py at which shapes. worker.py measures one candidate in a process of
its own, quality.py what its results are worth. process.py asks it, runner.py goes through the grid as far as budget.py
sees time for it. environment.py describes the machine, figures.py computes what follows from the measurements,
tables.py and page.py show them. `trak-fast plan` is plan.py, with rates from rates.py.
"""
