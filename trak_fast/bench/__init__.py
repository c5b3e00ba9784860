"""`trak-fast bench`: measures every random projection that a machine has, side by side.

candidates.py lists the projections, settings.py the shapes (case.py) to measure them at. worker.py measures one
candidate in a process of its own, quality.py checks its results. process.py talks to that process, runner.py goes
through the grid as far as budget.py sees time for it. environment.py describes the machine, results.py is the file of
results, figures.py computes what follows from them, tables.py and page.py show them with the units of units.py.
"""
